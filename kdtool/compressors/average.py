"""The mean of several checkpoints of one model: nothing smaller, often a little better."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdtool.compressors._base import Context, Made, in_memory
from kdtool.errors import ModelProblem, UsageProblem
from kdtool.lazy import Lazy, State, held, row_blocks
from kdtool.models import Loaded, load_model, load_skeleton

paper = "Wortsman et al.: Model soups: averaging weights of multiple fine-tuned models, 2022, arXiv:2203.05482"
streams = True


@dataclass(frozen=True)
class Config:
    """Settings."""

    models: list[str]
    """The other checkpoints: folders or Hub ids of models of the same shape."""


def _others(loaded: Loaded, config: Config, context: Context) -> list[State]:
    """The weights of the other checkpoints, in memory only where the model is."""
    if next(loaded.model.parameters()).is_meta:
        return [load_skeleton(name, context.task.auto_class, context.run)[1] for name in config.models]
    models = [load_model(name, context.task.auto_class, context.run, "model").model for name in config.models]
    return [held(model.state_dict()) for model in models]


def _mean(parts: list[Lazy]) -> Lazy:
    def load() -> Tensor:
        first = parts[0].load()
        others = [part.load() for part in parts[1:]]
        if not first.ndim:
            return torch.stack([first, *others]).double().mean().to(first.dtype)
        for rows in row_blocks(first):
            first[rows] = sum((other[rows].double() for other in others), first[rows].double()) / len(parts)
        return first

    return Lazy(parts[0].shape, parts[0].dtype, load)


def stream(loaded: Loaded, state: State, config: Config, context: Context) -> Made:
    """A model whose weights are the mean of the model's and the others', weight by weight.

    Raises:
        UsageProblem: no other checkpoint is named.
        ModelProblem: a checkpoint has other weights.
    """
    if not config.models:
        raise UsageProblem("average: no other checkpoint given", hint="--set method.models=[./run-1,./run-2]")
    others = _others(loaded, config, context)
    for reference, other in zip(config.models, others, strict=True):
        if other.keys() != state.keys() or any(other[name].shape != state[name].shape for name in state):
            raise ModelProblem(f"average: '{reference}' is not of the same shape as '{loaded.ref}'")
    # buffers of whole numbers, such as counts of batches, stay those of the model itself
    means = {
        name: _mean([own, *(other[name] for other in others)]) if own.dtype.is_floating_point else own
        for name, own in state.items()
    }
    return Made(loaded.model.config, means, {"averaged": 1 + len(others)})


def compress(loaded: Loaded, config: Config, context: Context) -> Loaded:
    """A model whose weights are the mean of the model's and the others'; see `stream`."""
    return in_memory(stream, loaded, config, context)
