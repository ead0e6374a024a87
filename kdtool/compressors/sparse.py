"""Set the weights that matter least to zero: by size, or with data by size times activation (Wanda)."""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from kdtool.compressors._base import Context, carried, layers_of, linears, run_over, watching
from kdtool.errors import ModelProblem, UsageProblem
from kdtool.models import Loaded

paper = (
    "Sun, Liu, Bair, Kolter: A Simple and Effective Pruning Approach for Large Language Models, 2023, arXiv:2306.11695"
)

_GROUP = 4
"""Inputs of a group of the 2:4 pattern."""


@dataclass(frozen=True)
class Config:
    """Settings."""

    keep: float = 0.5
    """Share of the weights of each row to keep, above 0 and at most 1; not used by 2:4."""
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    """Any weights of a row, or two of each four neighbours, the pattern that some GPUs compute faster."""


def mask_of(scores: Tensor, config: Config) -> Tensor:
    """Which weights stay.

    Args:
        scores: [outputs, inputs].
        config: The settings.

    Returns:
        Bool, in the shape of the scores.

    Raises:
        ModelProblem: the inputs cannot be grouped by four.
    """
    outputs, inputs = scores.shape
    grouped, count = scores, max(1, round(config.keep * inputs))
    if config.pattern == "2:4":
        if inputs % _GROUP:
            raise ModelProblem(f"sparse: {inputs} inputs cannot be grouped by {_GROUP}", hint="pattern=unstructured")
        grouped, count = scores.reshape(-1, _GROUP), _GROUP // 2
    best = grouped.argsort(dim=1, descending=True, stable=True)[:, :count]
    kept = torch.zeros_like(grouped, dtype=torch.bool).scatter(1, best, True)
    return kept.reshape(outputs, inputs)


def compress(loaded: Loaded, config: Config, context: Context) -> Loaded:
    """The model with zeros among the weights of its layers, in the shapes it had.

    Raises:
        UsageProblem: keep is no share.
        ModelProblem: the architecture has no single stack of layers, or 2:4 does not fit.
    """
    if not 0.0 < config.keep <= 1.0:
        raise UsageProblem(f"sparse: keep={config.keep:g} is no share of the weights", hint="above 0 and at most 1")
    model: Any = copy.deepcopy(loaded.model)
    own = Loaded(model, loaded.processor, loaded.ref, None, None, {})
    path, layers = layers_of(own)
    modules = {f"{path}.{i}.{name}": part for i, layer in enumerate(layers) for name, part in linears(layer).items()}
    squares: dict[str, Tensor] = {}

    def note(name: str, inputs: Tensor) -> None:
        found = inputs.double().square().sum(0)
        squares[name] = squares[name] + found if name in squares else found

    if context.batches is not None:
        with watching(modules, note):
            run_over(model, context)
    zeros = total = 0
    with torch.no_grad():
        for name, module in modules.items():
            matrix = module.weight.T if isinstance(module, Conv1D) else module.weight
            scores = matrix.abs().double()
            kept = mask_of(scores * squares[name].sqrt() if name in squares else scores, config)
            matrix.mul_(kept)  # a transposed view writes through
            zeros, total = zeros + int((~kept).sum()), total + kept.numel()
    facts = carried(loaded, zeros=zeros, weights=total)
    return Loaded(model.eval(), loaded.processor, loaded.ref, None, None, facts)
