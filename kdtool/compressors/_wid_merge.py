"""Compactors around the linear maps of an encoder, and their merge into smaller weights (WID, section 3).

A compacted linear map computes y = R (W (L x) + b); dropped columns of L and rows of R become zero.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdtool.compressors._wid_anatomy import Anatomy, Site

State = Mapping[str, Tensor]

COMPACTORS = ("inner", "outer", "stream")
"""Names of the parameters that are compactors."""
_INHERITED = ".inherited."


class CompactedLinear(nn.Module):
    """y = R (W (L x) + b).

    Attributes:
        inherited: The linear map itself.
        inner: L [in, in], or None.
        outer: R [out, out], or None.
    """

    def __init__(self, linear: Any, inner: bool, outer: bool) -> None:
        super().__init__()
        self.inherited = linear
        like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.inner = nn.Parameter(torch.eye(linear.in_features, **like)) if inner else None
        self.outer = nn.Parameter(torch.eye(linear.out_features, **like)) if outer else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]; one product or three, whichever multiplies less."""
        weight, bias = self.inherited.weight, self.inherited.bias
        wide, high = weight.shape[1], weight.shape[0]
        apart = (0 if self.inner is None else wide**2) + (0 if self.outer is None else high**2)
        once = (0 if self.inner is None else wide**2 * high) + (0 if self.outer is None else high**2 * wide)
        if x.numel() // wide * apart > once:
            weight = weight if self.inner is None else weight @ self.inner
            if self.outer is not None:
                weight, bias = self.outer @ weight, None if bias is None else self.outer @ bias
            return functional.linear(x, weight, bias)
        x = x if self.inner is None else functional.linear(x, self.inner)
        y: Tensor = self.inherited(x)
        return y if self.outer is None else functional.linear(y, self.outer)


class KeptLayerNorm(nn.Module):
    """A LayerNorm whose mean and (biased) deviation are over kept dimensions only.

    The others are normalised alike, since what reads them is to become zero, not they; with `hard` they are zero.
    """

    keep: Tensor

    def __init__(self, norm: Any, hard: bool = False) -> None:
        super().__init__()
        self.inherited, self.hard = norm, hard
        self.register_buffer("keep", torch.ones_like(norm.weight, dtype=torch.bool), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] to [..., n]."""
        norm, keep = self.inherited, self.keep.to(x.dtype)
        count = keep.sum()
        mean = (x * keep).sum(-1, keepdim=True) / count
        centred = x - mean
        variance = (centred.square() * keep).sum(-1, keepdim=True) / count
        y: Tensor = centred * torch.rsqrt(variance + norm.eps) * norm.weight + norm.bias
        return y * keep if self.hard else y


class Entry(nn.Module):
    """The compactor of the residual stream, before the module that embeddings go through first."""

    def __init__(self, module: Any, like: Tensor, size: int) -> None:
        super().__init__()
        self.inherited = module
        self.stream = nn.Parameter(torch.eye(size, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        y: Tensor = self.inherited(functional.linear(x, self.stream))
        return y


def compacted(model: nn.Module, anatomy: Anatomy) -> Any:
    """A copy of a model with compactors in place, all of them the identity, and nothing dropped."""
    wrapped: Any = copy.deepcopy(model)
    like = next(wrapped.parameters())
    for site in anatomy.sites:
        linear = wrapped.get_submodule(site.path)
        wrapped.set_submodule(site.path, CompactedLinear(linear, site.inner is not None, site.outer is not None))
    for path in anatomy.norms:
        wrapped.set_submodule(path, KeptLayerNorm(wrapped.get_submodule(path), hard=path == anatomy.pooled))
    if anatomy.entry is not None:
        wrapped.set_submodule(anatomy.entry, Entry(wrapped.get_submodule(anatomy.entry), like, anatomy.hidden))
    return wrapped


def _norm_at(wrapped: Any, path: str) -> Any:
    module = wrapped.get_submodule(path)
    return module.inherited if isinstance(module, Entry) else module


def compactors_of(wrapped: Any, anatomy: Anatomy) -> dict[str, nn.Parameter]:
    """Compactors by name: KEY_in and KEY_out of each site, and `emb` of the stream."""
    found: dict[str, nn.Parameter] = {}
    for site in anatomy.sites:
        module = wrapped.get_submodule(site.path)
        found |= {f"{site.key}_in": module.inner} if site.inner is not None else {}
        found |= {f"{site.key}_out": module.outer} if site.outer is not None else {}
    if anatomy.entry is not None:
        found["emb"] = wrapped.get_submodule(anatomy.entry).stream
    return found


def roles_of(wrapped: Any, anatomy: Anatomy) -> list[tuple[nn.Parameter, str, str]]:
    """Each parameter of which a keep-set drops something, with its role (`in`, `out`, `bias`) and that keep-set.

    The bias of a map belongs to its outputs; norms give up their bias alone (section 3.4).
    """
    compactors = compactors_of(wrapped, anatomy)
    found: list[tuple[nn.Parameter, str, str]] = []
    for site in anatomy.sites:
        bias = wrapped.get_submodule(site.path).inherited.bias
        if site.inner is not None:
            found.append((compactors[f"{site.key}_in"], "in", site.inner))
        if site.outer is not None:
            found.append((compactors[f"{site.key}_out"], "out", site.outer))
            found += [] if bias is None else [(bias, "bias", site.outer)]
    for path, group in anatomy.norms.items():
        found.append((_norm_at(wrapped, path).inherited.bias, "bias", group))
    if anatomy.entry is not None:
        found.append((compactors["emb"], "out", "hidden"))
    return found


def set_masks(wrapped: Any, anatomy: Anatomy, keep: State) -> None:
    """Tell the norms what is kept.

    Args:
        wrapped: From `compacted`; changed in place.
        anatomy: Of the model.
        keep: Keep-set to bool [n].
    """
    for path, group in anatomy.norms.items():
        _norm_at(wrapped, path).keep.copy_(keep[group])


@torch.no_grad()
def zeroed(wrapped: Any, anatomy: Anatomy, keep: State) -> Any:
    """A copy in which all that the keep-sets drop is zero: what a merge is exact for."""
    masked = copy.deepcopy(wrapped)
    set_masks(masked, anatomy, keep)
    for path in anatomy.norms:
        _norm_at(masked, path).hard = True
    for compactor, role, group in roles_of(masked, anatomy):
        if role != "bias":
            compactor.mul_(keep[group].unsqueeze(0 if role == "in" else 1))
    return masked


@torch.no_grad()
def largest_dropped_norm(wrapped: Any, anatomy: Anatomy, keep: State) -> float:
    """Largest L2 norm among dropped columns of in-compactors and dropped rows of out-compactors; 0 if none is."""
    largest = 0.0
    for compactor, role, group in roles_of(wrapped, anatomy):
        gone = ~keep[group]
        if role != "bias" and gone.any():
            norms = torch.linalg.vector_norm(compactor, dim=0 if role == "in" else 1)
            largest = max(largest, float(norms[gone].max()))
    return largest


def inherited_state(wrapped: Any) -> dict[str, Tensor]:
    """The model's own weights, as trained, under the names that they have without compactors."""
    own = {}
    for name, value in wrapped.state_dict().items():
        if name.rpartition(".")[2] in COMPACTORS:
            continue
        while _INHERITED in name:  # the entry of the stream may be a norm, which is wrapped itself
            name = name.replace(_INHERITED, ".", 1)
        own[name] = value
    return own


def query_factor(head_size: int, kept_head_size: int) -> float:
    """Factor of merged query weights: the student divides scores by its own, smaller head size."""
    return math.sqrt(kept_head_size / head_size)


def _merged_site(site: Site, state: State, compactors: State, keep: State, factor: float) -> dict[str, Tensor]:
    """Weights of one map, in float64."""
    weight, bias = state[f"{site.path}.weight"].double(), state.get(f"{site.path}.bias")
    bias = None if bias is None else bias.double()
    if site.inner is not None:
        weight = weight @ compactors[f"{site.key}_in"][:, keep[site.inner]].double()
    if site.outer is not None:
        outer = compactors[f"{site.key}_out"][keep[site.outer]].double()
        weight, bias = outer @ weight, None if bias is None else outer @ bias
    scale = factor if site.key.endswith(".query") else 1.0
    made = {f"{site.path}.weight": weight * scale}
    return made if bias is None else made | {f"{site.path}.bias": bias * scale}


def _merged_entry(anatomy: Anatomy, state: State, into: Tensor) -> dict[str, Tensor]:
    """Embeddings, in float64; `into` [H_s, H] is what is kept of the compactor of the stream."""
    made = {name: state[name].double() @ into.T for name in anatomy.tables}
    if anatomy.patches is not None:
        weight, bias = (state[f"{anatomy.patches}.{part}"].double() for part in ("weight", "bias"))
        made[f"{anatomy.patches}.weight"] = torch.einsum("sh,hcij->scij", into, weight)
        made[f"{anatomy.patches}.bias"] = into @ bias
    return made


def merge(state: State, compactors: State, keep: State, anatomy: Anatomy, factor: float) -> dict[str, Tensor]:
    """Multiply compactors into the weights, keeping only what the keep-sets hold.

    Args:
        state: Weights of the model; those outside the pattern pass through.
        compactors: `emb`, and KEY_in and KEY_out of each site.
        keep: Keep-set to bool [n], or to rising indices.
        anatomy: Of the model.
        factor: From `query_factor`; 1 where heads keep their size.

    Returns:
        Weights of the smaller model under the same names, in the formats they had.
    """
    made: dict[str, Tensor] = {}
    for site in anatomy.sites:
        made |= _merged_site(site, state, compactors, keep, factor)
    if anatomy.entry is not None:
        made |= _merged_entry(anatomy, state, compactors["emb"][keep["hidden"]].double())
    for path, group in anatomy.norms.items():
        made |= {f"{path}.{part}": state[f"{path}.{part}"][keep[group]] for part in ("weight", "bias")}
    return dict(state) | {name: value.to(state[name].dtype).contiguous() for name, value in made.items()}
