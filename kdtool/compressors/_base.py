"""What a compressor gets and gives back, and the statistics that several of them need.

A compressor is a file with `Config` (a frozen dataclass of literal defaults), the literal `paper`, and

    compress(loaded, config, context) -> Loaded

It must leave the model it is given as it is. A compressor that trains says so by the literal `trains = True`; one
that does not fit every task names those it fits in the literal `tasks`, and in `needs` what the others lack.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kdtool.config import TrainSection
from kdtool.data.examples import Examples
from kdtool.derive import depth_of
from kdtool.errors import ModelProblem
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.tasks._base import Batch, Task
from kdtool.tasks._views import Views

Linear: TypeAlias = Any
"""`nn.Linear`, or GPT-2's `Conv1D`, whose class is not typed."""


@dataclass(frozen=True, slots=True)
class Context:
    """What surrounds a compressor.

    Attributes:
        task: Runs the model.
        batches: Real inputs without labels, for statistics and for comparing outputs; None without data.
        run: Context of the run.
        rows: Encoded training rows, for compressors that train; None where there are none.
        train: How to train on them; length and learning rates are the compressor's own.
        checkpoints: Where its checkpoints go; None for none.
        views: Makes altered rows to train on; None to train on the rows as they are.
    """

    task: Task
    batches: Sequence[Batch] | None
    run: Run
    rows: Examples | None = None
    train: TrainSection = field(default_factory=TrainSection)
    checkpoints: Path | None = None
    views: Views | None = None


def body_config(config: Any) -> Any:
    """The configuration of the transformer itself, where a model wraps one."""
    return getattr(config, "backbone_config", None) or config


def layers_of(loaded: Loaded) -> tuple[str, list[nn.Module]]:
    """Path of the module list that holds the layers, and the layers.

    Raises:
        ModelProblem: the architecture has no single stack of layers.
    """
    config: Any = loaded.model.config
    _, path = depth_of(config, loaded.model)
    return path, list(loaded.model.get_submodule(path).children())


def rebuilt(loaded: Loaded, config: Any, state: Mapping[str, Tensor], **facts: Any) -> Loaded:
    """A model of the same class with another configuration and other weights.

    Raises:
        ModelProblem: the weights are not of the shapes that the configuration states.
    """
    with torch.random.fork_rng():
        model = type(loaded.model)(config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelProblem(
            f"'{loaded.ref}' cannot be cut this way: its configuration does not state such shapes",
            why=str(error).strip().rsplit("\n", 1)[-1].strip()[:300],
        ) from None
    return Loaded(model.eval(), loaded.processor, loaded.ref, None, None, carried(loaded, **facts))


def carried(loaded: Loaded, **facts: Any) -> dict[str, Any]:
    """Facts of a compressed model: its stored number format, trained weights, and what a compressor adds."""
    return {"new_weights": [], "dtype": loaded.facts.get("dtype", "float32"), **facts}


def shape_of(module: Linear) -> tuple[int, int]:
    """Inputs and outputs of a linear map; GPT-2 stores its own the other way round."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return module.in_features, module.out_features


def linears(module: nn.Module) -> dict[str, Linear]:
    """The linear maps inside a module, by path."""
    return {name: part for name, part in module.named_modules() if isinstance(part, (nn.Linear, Conv1D))}


@contextlib.contextmanager
def watching(modules: Mapping[str, nn.Module], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `note(NAME, inputs [tokens, width])` whenever one of the modules runs."""

    def hook(name: str) -> Any:
        return lambda _, args: note(name, args[0].detach().reshape(-1, args[0].shape[-1]))

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_over(model: nn.Module, context: Context) -> list[Tensor]:
    """Logits [units, classes] of each batch, in float32; empty without data."""
    model.eval()
    return [context.task.forward(model, batch).logits.float() for batch in context.batches or ()]
