"""Compactors around the linear maps of an encoder, and their merge into smaller weights (WID, section 3).

A compacted linear map computes y = R (W (L x) + b); dropped columns of L and rows of R are zero. Keep-sets
align them: `hidden` is the residual stream, `attn.l` and `ffn.l` the inner sides of layer l, `mlm` the
output of the head's transform.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

State = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Site:
    """One linear map.

    Attributes:
        path: Module path in the model.
        key: Stem of its compactors' names: KEY_in and KEY_out.
        inner: Keep-set of its inputs.
        outer: Keep-set of its outputs; None where they are not cut.
    """

    path: str
    key: str
    inner: str
    outer: str | None


def sites(prefix: str, depth: int) -> list[Site]:
    """The linear maps of a BERT-like masked language model.

    Args:
        prefix: Name of its body, such as `bert`.
        depth: Number of layers.
    """
    found: list[Site] = []
    for i in range(depth):
        at, key, attn, ffn = f"{prefix}.encoder.layer.{i}", f"layer.{i}", f"attn.{i}", f"ffn.{i}"
        found += [
            Site(f"{at}.attention.self.{name}", f"{key}.{name}", "hidden", attn) for name in ("query", "key", "value")
        ]
        found += [
            Site(f"{at}.attention.output.dense", f"{key}.attn_output", attn, "hidden"),
            Site(f"{at}.intermediate.dense", f"{key}.intermediate", "hidden", ffn),
            Site(f"{at}.output.dense", f"{key}.output", ffn, "hidden"),
        ]
    head = "cls.predictions"
    found.append(Site(f"{head}.transform.dense", "mlm_transform", "hidden", "mlm"))
    found.append(Site(f"{head}.decoder", "mlm_decoder", "mlm", None))
    return found


def norms(prefix: str, depth: int) -> dict[str, str]:
    """Path of each LayerNorm to the keep-set it works on; that of the embeddings comes first."""
    found = {f"{prefix}.embeddings.LayerNorm": "hidden"}
    for i in range(depth):
        at = f"{prefix}.encoder.layer.{i}"
        found |= {f"{at}.attention.output.LayerNorm": "hidden", f"{at}.output.LayerNorm": "hidden"}
    return found | {"cls.predictions.transform.LayerNorm": "mlm"}


def kept_layer_norm(x: Tensor, keep: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm whose mean and deviation are over kept dimensions only; dropped ones give zero.

    Args:
        x: [..., n].
        keep: Indices [m] of kept dimensions, rising.
        weight: [n].
        bias: [n].
        eps: Added to the (biased) variance.
    """
    inner = functional.layer_norm(x[..., keep], (len(keep),), weight[keep], bias[keep], eps)
    return torch.zeros_like(x).index_copy(-1, keep, inner)


class KeptLayerNorm(nn.Module):
    """A LayerNorm over kept dimensions, after an optional compactor."""

    def __init__(self, norm: Any, keep: Tensor, compactor: Tensor | None = None) -> None:
        super().__init__()
        self.norm, self.keep = norm, keep
        self.compactor = compactor

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] to [..., n]."""
        if self.compactor is not None:
            x = functional.linear(x, self.compactor)
        return kept_layer_norm(x, self.keep, self.norm.weight, self.norm.bias, self.norm.eps)


class CompactedLinear(nn.Module):
    """y = R (W (L x) + b), with the dropped columns of L and rows of R taken as zero."""

    def __init__(self, linear: Any, inner: Tensor, outer: Tensor | None) -> None:
        super().__init__()
        self.linear, self.inner, self.outer = linear, inner, outer

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        y: Tensor = self.linear(functional.linear(x, self.inner))
        return y if self.outer is None else functional.linear(y, self.outer)


def _columns(matrix: Tensor, keep: Tensor) -> Tensor:
    return torch.zeros_like(matrix).index_copy(1, keep, matrix[:, keep])


def _rows(matrix: Tensor, keep: Tensor) -> Tensor:
    return torch.zeros_like(matrix).index_copy(0, keep, matrix[keep])


def compacted(model: nn.Module, compactors: State, keep: State) -> nn.Module:
    """A copy of a masked language model with its compactors in place and dropped dimensions zeroed.

    Args:
        model: BERT-like, with a `base_model_prefix`.
        compactors: `emb`, and KEY_in and KEY_out of each site.
        keep: Keep-set to rising indices.
    """
    wrapped: Any = copy.deepcopy(model)
    prefix, depth = wrapped.base_model_prefix, wrapped.config.num_hidden_layers
    for site in sites(prefix, depth):
        inner = _columns(compactors[f"{site.key}_in"], keep[site.inner])
        outer = None if site.outer is None else _rows(compactors[f"{site.key}_out"], keep[site.outer])
        wrapped.set_submodule(site.path, CompactedLinear(wrapped.get_submodule(site.path), inner, outer))
    for place, (path, group) in enumerate(norms(prefix, depth).items()):
        first = _rows(compactors["emb"], keep["hidden"]) if place == 0 else None
        wrapped.set_submodule(path, KeptLayerNorm(wrapped.get_submodule(path), keep[group], first))
    return wrapped  # type: ignore[no-any-return]


def query_factor(head_size: int, kept_head_size: int) -> float:
    """Factor of merged query weights: the student divides scores by its own, smaller head size."""
    return math.sqrt(kept_head_size / head_size)


def merge(state: State, compactors: State, keep: State, prefix: str, factor: float) -> dict[str, Tensor]:
    """Multiply compactors into the weights, keeping only what the keep-sets hold.

    Args:
        state: Weights of the masked language model; those outside the pattern pass through.
        compactors: As for `compacted`.
        keep: As for `compacted`.
        prefix: Name of the model's body.
        factor: From `query_factor`; 1 where heads keep their size.

    Returns:
        Weights of the student, under the same names. The decoder has weights of its own.
    """
    merged = dict(state)
    hidden = keep["hidden"]
    depth = sum(group.startswith("attn.") for group in keep)
    for site in sites(prefix, depth):
        weight, bias = state[f"{site.path}.weight"], state.get(f"{site.path}.bias")
        weight = weight @ compactors[f"{site.key}_in"][:, keep[site.inner]]
        if site.outer is not None:
            outer = compactors[f"{site.key}_out"][keep[site.outer]]
            weight, bias = outer @ weight, None if bias is None else outer @ bias
        scale = factor if site.path.endswith(".self.query") else 1.0
        merged[f"{site.path}.weight"] = weight * scale
        if bias is not None:
            merged[f"{site.path}.bias"] = bias * scale
    for name in ("word", "position", "token_type"):
        key = f"{prefix}.embeddings.{name}_embeddings.weight"
        merged[key] = state[key] @ compactors["emb"][hidden].T
    for path, group in norms(prefix, depth).items():
        for part in ("weight", "bias"):
            merged[f"{path}.{part}"] = state[f"{path}.{part}"][keep[group]]
    return merged
