"""Factor each matrix of the layers into two thin ones by singular values, weighted by what the data excites."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdtool.compressors._base import Context, Linear, carried, layers_of, linears, run_over, shape_of, watching
from kdtool.errors import ModelProblem, UsageProblem
from kdtool.modeling.low_rank import KINDS, LowRankConfig, assemble
from kdtool.models import Loaded

paper = "Wang et al.: SVD-LLM: Truncation-aware Singular Value Decomposition, 2024, arXiv:2403.07378"

_RIDGE = 1e-6
"""Share of the mean second moment that is added to all of them, so that none is zero."""


@dataclass(frozen=True)
class Config:
    """Settings."""

    keep: float = 0.5
    """Share of the weights of each matrix to keep, above 0 and below 1."""
    energy: float | None = None
    """Instead: share of the squared singular values to keep in each matrix; those it would not shrink stay whole."""


def _moments(loaded: Loaded, modules: dict[str, Linear], context: Context) -> dict[str, Tensor]:
    """Second moments [inputs, inputs] of the inputs of each map; empty without data."""
    found: dict[str, Tensor] = {}

    def note(name: str, inputs: Tensor) -> None:
        x = inputs.double()
        found[name] = found[name] + x.T @ x if name in found else x.T @ x

    with watching(modules, note):
        run_over(loaded.model, context)
    return found


def _rank(values: Tensor, shape: tuple[int, int], config: Config) -> int:
    """Rank of a matrix by its singular values, rising to the whole one."""
    if config.energy is not None:
        share = values.square().cumsum(0) / values.square().sum()
        return min(len(values), int((share < config.energy).sum()) + 1)
    inputs, outputs = shape
    return max(1, int(config.keep * inputs * outputs / (inputs + outputs)))


def _factors(weight: Tensor, moment: Tensor | None, config: Config) -> tuple[Tensor, Tensor] | None:
    """B [outputs, rank] and A [rank, inputs], the best for the mean squared output; None if they are not smaller."""
    w = weight.detach().double()
    outputs, inputs = w.shape
    root = None
    if moment is not None:
        ridge = _RIDGE * moment.diagonal().mean() + torch.finfo(torch.float64).tiny
        root = torch.linalg.cholesky(moment + ridge * torch.eye(inputs, dtype=torch.float64))
    u, values, v = torch.linalg.svd(w if root is None else w @ root, full_matrices=False)
    rank = _rank(values, (inputs, outputs), config)
    if rank * (inputs + outputs) >= inputs * outputs:
        return None
    scale = values[:rank].sqrt()
    inner = scale.unsqueeze(1) * v[:rank]
    if root is not None:
        inner = torch.linalg.solve_triangular(root, inner, upper=False, left=False)
    return (u[:, :rank] * scale).to(weight.dtype), inner.to(weight.dtype)


def compress(loaded: Loaded, config: Config, context: Context) -> Loaded:
    """The model with its layers' matrices factored where that makes them smaller.

    Raises:
        UsageProblem: a share is not one.
        ModelProblem: the model is factored already, or its task is not one of classification or language.
    """
    for name, share in (("keep", config.keep), ("energy", config.energy)):
        if share is not None and not 0.0 < share < 1.0:
            raise UsageProblem(f"low-rank: {name}={share:g} is no share", hint="above 0 and below 1")
    if isinstance(loaded.model.config, LowRankConfig) or context.task.auto_class not in KINDS:
        raise ModelProblem(
            f"low-rank: '{loaded.ref}' cannot be factored", hint="low-rank comes once, as the last stage"
        )
    path, layers = layers_of(loaded)
    modules = {f"{path}.{i}.{name}": part for i, layer in enumerate(layers) for name, part in linears(layer).items()}
    moments = _moments(loaded, modules, context) if context.batches is not None else {}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in modules.items():
        weight: Tensor = module.weight
        if shape_of(module) != tuple(weight.shape[::-1]):
            weight = weight.T
        found = _factors(weight, moments.get(name), config)
        if found is not None:
            factors[name] = found
    if not factors:
        raise ModelProblem("low-rank: no matrix would become smaller", hint="a smaller keep or energy")
    model = assemble(loaded.model, context.task.auto_class, factors)
    ranks = {name: len(inner) for name, (_, inner) in factors.items()}
    return Loaded(model, loaded.processor, loaded.ref, None, None, carried(loaded, ranks=ranks))
