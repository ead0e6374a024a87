"""Set the weights that matter least to zero: by size, or with data by size times activation (Wanda)."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdtool.compressors._base import Context, Made, in_memory, linear_parts, matrix_of, run_over, watching
from kdtool.errors import ModelProblem, UsageProblem
from kdtool.lazy import State, row_blocks
from kdtool.models import Loaded

paper = (
    "Sun, Liu, Bair, Kolter: A Simple and Effective Pruning Approach for Large Language Models, 2023, arXiv:2306.11695"
)
streams = True
trainable = False

_GROUP = 4
"""Inputs of a group of the 2:4 pattern."""


@dataclass(frozen=True)
class Config:
    """Settings."""

    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the weights of each row to keep, above 0 and at most 1; not used by 2:4."""
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    """Any weights of a row, or two of each four neighbours, the pattern that some GPUs compute faster."""
    score: Literal["auto", "magnitude", "wanda"] = "auto"
    """Size of a weight, or that times the size of its input on data; auto is wanda where there is data."""


def mask_of(scores: Tensor, config: Config) -> Tensor:
    """Which weights stay.

    Args:
        scores: [outputs, inputs].
        config: The settings.

    Returns:
        Bool, in the shape of the scores.
    """
    outputs, inputs = scores.shape
    grouped, count = scores, max(1, round(config.keep * inputs))
    if config.pattern == "2:4":
        grouped, count = scores.reshape(-1, _GROUP), _GROUP // 2
    best = grouped.argsort(dim=1, descending=True, stable=True)[:, :count]
    kept = torch.zeros_like(grouped, dtype=torch.bool).scatter(1, best, True)
    return kept.reshape(outputs, inputs)


def _activations(loaded: Loaded, config: Config, context: Context) -> dict[str, Tensor]:
    """Root of the sum of squares of each input of each map on data; empty where size alone counts.

    Raises:
        UsageProblem: there is no data, or no model to run, for what was asked.
    """
    on_meta = next(loaded.model.parameters()).is_meta
    if config.score == "wanda" and (context.batches is None or on_meta):
        why = "runs the model, which is not held in memory" if on_meta else "looks at activations on data"
        raise UsageProblem(f"sparse: score=wanda {why}", hint="score=magnitude, or add --data DATA")
    if config.score == "magnitude" or context.batches is None or on_meta:
        return {}
    squares: dict[str, Tensor] = {}

    def note(name: str, inputs: Tensor) -> None:
        found = inputs.double().square().sum(0)
        squares[name] = squares[name] + found if name in squares else found

    with watching(linear_parts(loaded), note):
        run_over(loaded.model, context)
    return {name: found.sqrt() for name, found in squares.items()}


def _pruning(module: Any, scale: Tensor | None, config: Config) -> Callable[[Tensor], Tensor]:
    """A function that sets weights of a map to zero."""

    def prune(weight: Tensor) -> Tensor:
        matrix = matrix_of(module, weight)
        for rows in row_blocks(matrix):
            scores = matrix[rows].abs().double()
            matrix[rows] *= mask_of(scores if scale is None else scores * scale, config)
        return weight

    return prune


def stream(loaded: Loaded, state: State, config: Config, context: Context) -> Made:
    """The model with zeros among the weights of its layers, in the shapes it had, weight by weight.

    Raises:
        UsageProblem: wanda lacks data.
        ModelProblem: the architecture has no single stack of layers, or 2:4 does not fit.
    """
    modules, scales = linear_parts(loaded), _activations(loaded, config, context)
    cut, kept, total = dict(state), 0, 0
    for path, module in modules.items():
        outputs, inputs = matrix_of(module, module.weight).shape
        if config.pattern == "2:4" and inputs % _GROUP:
            raise ModelProblem(f"sparse: {inputs} inputs cannot be grouped by {_GROUP}", hint="pattern=unstructured")
        stays = inputs // 2 if config.pattern == "2:4" else max(1, round(config.keep * inputs))
        kept, total = kept + outputs * stays, total + outputs * inputs

        cut[f"{path}.weight"] = cut[f"{path}.weight"].then(_pruning(module, scales.get(path), config))
    facts = {"zeros": total - kept, "weights": total}
    return Made(copy.deepcopy(loaded.model.config), cut, facts)


def compress(loaded: Loaded, config: Config, context: Context) -> Loaded:
    """The model with zeros among the weights of its layers; see `stream`."""
    return in_memory(stream, loaded, config, context)
