"""Factor each matrix of the layers into two thin ones by singular values, weighted by what the data excites."""

import copy
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdtool.compressors._base import (
    Context,
    Linear,
    Made,
    known,
    linear_parts,
    matrix_of,
    rebuilt,
    reformed,
    run_over,
    watching,
)
from kdtool.errors import ModelProblem
from kdtool.lazy import held
from kdtool.modeling.quantized import QuantizedLinear
from kdtool.models import Loaded

paper = "Wang et al.: SVD-LLM: Truncation-aware Singular Value Decomposition, 2024, arXiv:2403.07378"
dials = {"keep": 0.01}

_RIDGE = 1e-6
"""Share of the mean second moment that is added to all of them, so that none is zero."""


@dataclass(frozen=True)
class Config:
    """Settings."""

    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the weights to keep, above 0 and at most 1: of each matrix, or with ranks=global of all together."""
    ranks: Literal["uniform", "global"] = "uniform"
    """The same share of each matrix, or the singular values that matter most for their size wherever they are."""
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Instead: share of the squared singular values to keep in each matrix; those it would not shrink stay whole."""


@dataclass(frozen=True, slots=True)
class _Spectrum:
    """A matrix in its singular vectors, weighted by data: W S = U diag(values) V.

    Attributes:
        u: [outputs, n], v: [n, inputs], values: [n], falling.
        root: S [inputs, inputs], lower triangular; None without data.
    """

    u: Tensor
    values: Tensor
    v: Tensor
    root: Tensor | None

    @property
    def each(self) -> int:
        """Weights that one more rank costs."""
        return self.u.shape[0] + self.v.shape[1]

    @property
    def whole(self) -> int:
        """Weights of the matrix as it is."""
        return self.u.shape[0] * self.v.shape[1]

    def factors(self, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """B [outputs, rank] and A [rank, inputs], the best for the mean squared output."""
        scale = self.values[:rank].sqrt()
        inner = scale.unsqueeze(1) * self.v[:rank]
        if self.root is not None:
            inner = torch.linalg.solve_triangular(self.root, inner, upper=False, left=False)
        return (self.u[:, :rank] * scale).to(dtype), inner.to(dtype)


def _moments(loaded: Loaded, modules: dict[str, Linear], context: Context) -> dict[str, Tensor]:
    """Second moments [inputs, inputs] of the inputs of each map; empty without data."""
    found: dict[str, Tensor] = {}

    def note(name: str, inputs: Tensor) -> None:
        x = inputs.double()
        found[name] = found[name] + x.T @ x if name in found else x.T @ x

    with watching(modules, note):
        run_over(loaded.model, context)
    return found


def _spectrum(weight: Tensor, moment: Tensor | None) -> _Spectrum:
    """Singular values of a matrix [outputs, inputs], weighted by the root of the second moments of its inputs."""
    w = weight.detach().double()
    root = None
    if moment is not None:
        ridge = _RIDGE * moment.diagonal().mean() + torch.finfo(torch.float64).tiny
        root = torch.linalg.cholesky(moment + ridge * torch.eye(w.shape[1], dtype=torch.float64))
    u, values, v = torch.linalg.svd(w if root is None else w @ root, full_matrices=False)
    return _Spectrum(u, values, v, root)


def _spectra(loaded: Loaded, context: Context) -> dict[str, _Spectrum]:
    """All matrices of the layers, by path."""
    modules = linear_parts(loaded)
    moments = _moments(loaded, modules, context) if context.batches is not None else {}
    return {
        name: _spectrum(matrix_of(module, module.weight), moments.pop(name, None)) for name, module in modules.items()
    }


def _ranks(spectra: dict[str, _Spectrum], config: Config) -> dict[str, int]:
    """Rank of each matrix; those that would not shrink are left out."""
    if config.energy is not None:
        found = {}
        for name, s in spectra.items():
            share = s.values.square().cumsum(0) / s.values.square().sum()
            found[name] = min(len(s.values), int((share < config.energy).sum()) + 1)
    elif config.ranks == "uniform":
        found = {name: max(1, int(config.keep * s.whole / s.each)) for name, s in spectra.items()}
    else:
        found = _global_ranks(spectra, config.keep)
    return {name: rank for name, rank in found.items() if rank * spectra[name].each < spectra[name].whole}


def _global_ranks(spectra: dict[str, _Spectrum], keep: float) -> dict[str, int]:
    """Ranks that share one budget: singular values in the order of what they hold of their matrix's output, by cost.

    A matrix whose factors reach its own size is taken whole, and costs no more from there on.
    """
    offers = [
        (float(gain) / s.each, name)
        for name, s in spectra.items()
        for gain in s.values.square() / s.values.square().sum()
    ]
    found = dict.fromkeys(spectra, 1)
    spent = sum(s.each for s in spectra.values())
    budget = keep * sum(s.whole for s in spectra.values())
    first = set(spectra)
    for _, name in sorted(offers, key=lambda offer: -offer[0]):
        if name in first:
            first.discard(name)  # each has one already
            continue
        s = spectra[name]
        cost = min(s.each, max(0, s.whole - found[name] * s.each))
        if spent + cost > budget:
            break
        found[name], spent = found[name] + 1, spent + cost
    return found


def compress(loaded: Loaded, config: Config, context: Context) -> Loaded:
    """The model with its layers' matrices factored where that makes them smaller.

    Raises:
        ModelProblem: the model is quantised, its task is not one of classification or language, or nothing shrinks.
    """
    if any(isinstance(part, QuantizedLinear) for part in loaded.model.modules()):
        raise ModelProblem(f"low-rank: '{loaded.ref}' is quantised", hint="quantize comes after low-rank")
    spectra: dict[str, _Spectrum] = known(context, "low-rank", loaded, lambda: _spectra(loaded, context))
    ranks = _ranks(spectra, config)
    if not ranks and config.keep == 1.0 and config.energy is None:
        state = held(loaded.model.state_dict())
        return rebuilt(loaded, Made(copy.deepcopy(loaded.model.config), state, {"ranks": {}}), context)
    if not ranks:
        raise ModelProblem("low-rank: no matrix would become smaller", hint="a smaller keep or energy")
    forms = {name: {"form": "low-rank", "rank": rank} for name, rank in ranks.items()}
    changed, prefix = reformed(loaded, loaded.model.config, forms, context)
    made = {}
    for name, tensor in loaded.model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if path not in ranks:
            made[prefix + name] = tensor
        elif leaf == "bias":
            made[f"{prefix}{path}.outer.bias"] = tensor
        else:
            outer, inner = spectra[path].factors(ranks[path], tensor.dtype)
            made |= {f"{prefix}{path}.outer.weight": outer, f"{prefix}{path}.inner.weight": inner}
    return rebuilt(loaded, Made(changed, held(made), {"ranks": ranks}), context)
