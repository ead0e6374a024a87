"""Softmax attention over several parts of the keys, merged by their log-sum-exps, with one exact gradient.

Every operator ends here: blocks, samples, centroids and near fields are parts, each with a bias that
holds its importance weights (log w) and its exclusions (-inf). On the CPU torch's flash kernel gives
the log-sum-exp at no cost and needs no memory for the logits; elsewhere the logits are formed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kdtool.attention._tree import rows_at

_HIDDEN = float("-inf")
_NEVER = 1e30
"""A log-sum-exp under which every probability is 0, for the backward pass of rows that see no key."""


class Tiles(NamedTuple):
    """Another arrangement of the queries, for a part whose keys differ from tile to tile.

    Attributes:
        rows: [X, Y' rows'] numbers of queries among the Y rows of a set, -1 for none.
        back: [X, Y rows] where each query stands.
    """

    rows: Tensor
    back: Tensor


class Part(NamedTuple):
    """Keys that all queries of a layout attend to.

    Attributes:
        k: [X, Y, keys, d]
        v: [X, Y, keys, dv]
        bias: [X or 1, Y or 1, rows or 1, keys] added to the scaled logits, constant in the gradient; or None.
        causal: True if row i sees the first i + 1 keys only.
        tiles: The arrangement of the queries that these keys and this bias are for, with Y' in the place of Y.
    """

    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    causal: bool = False
    tiles: Tiles | None = None


def hiding(where: Tensor) -> Tensor:
    """A bias of -inf where that is true, and 0 elsewhere."""
    return torch.zeros(where.shape, device=where.device).masked_fill_(where, _HIDDEN)


def merged(q: Tensor, parts: Sequence[Part], scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of q over the union of the parts' keys.

    Args:
        q: [X, Y, rows, d]
        parts: One or more; keys of different parts count separately.
        scale: Factor of the logits.

    Returns:
        out [X, Y, rows, dv] in the type of q, and lse [X, Y, rows] float32 (float64 for float64),
        which carries no gradient. Rows that see no key are zero, with lse -inf.
    """
    width, wide = q.shape[-1], parts[0].v.shape[-1]
    if len(parts) == 1 and wide == width and parts[0].tiles is None and not _learns(q, parts[0]):
        return _attend(q, *parts[0][:4], scale)
    biases = [None if p.bias is None else p.bias.detach() for p in parts]
    spec = (scale, tuple(p.causal for p in parts), biases, tuple(p.tiles for p in parts))
    outs = []
    lse: Tensor | None = None
    for start in range(0, wide, width):  # the kernel wants values as wide as keys
        tensors: list[Tensor] = []
        for part in parts:
            v = part.v[..., start : start + width]
            tensors += [part.k, v if v.shape[-1] == width else functional.pad(v, (0, width - v.shape[-1]))]
        out, lse = _Merged.apply(spec, q, *tensors)  # type: ignore[no-untyped-call]
        outs.append(out)
    assert lse is not None
    out = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
    return out[..., :wide], lse


def _learns(q: Tensor, part: Part) -> bool:
    """Whether a gradient may be asked for; where none is, short attention is spared the detour."""
    return torch.is_grad_enabled() and (q.requires_grad or part.k.requires_grad or part.v.requires_grad)


class _Merged(torch.autograd.Function):
    """Forward over all parts; backward once for each part with the merged output and log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, spec: Any, q: Tensor, *kv: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the parts, weighted by their shares of the denominator."""
        scale, causal, biases, tiles = spec
        found: tuple[Tensor, Tensor] | None = None
        for i in range(len(causal)):
            rows = _arranged(q, tiles[i], kv[2 * i])
            out, lse = _attend(rows, kv[2 * i], kv[2 * i + 1], biases[i], causal[i], scale)
            here = _back(out, tiles[i], q), _back(lse.unsqueeze(-1), tiles[i], q).squeeze(-1)
            found = here if found is None else _mixed(*found, *here)
        assert found is not None
        out, lse = found[0].to(q.dtype), found[1]
        ctx.spec = spec
        ctx.save_for_backward(q, out, lse, *kv)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Tensor | None, ...]:
        """Softmax's gradient needs only the final probabilities, so each part gives its share by itself."""
        scale, causal, biases, tiles = ctx.spec
        q, out, lse, *kv = ctx.saved_tensors
        lse = lse.masked_fill(lse == _HIDDEN, _NEVER)
        dq: Tensor | None = None
        grads: list[Tensor] = []
        for i in range(len(causal)):
            k, v = kv[2 * i : 2 * i + 2]
            up, rows, answer, total = (_arranged(x, tiles[i], k) for x in (grad, q, out, lse.unsqueeze(-1)))
            if tiles[i] is not None:  # places without a query take no part
                up = up.masked_fill((tiles[i].rows < 0).reshape(*up.shape[:3], 1), 0.0)
            own, dk, dv = _differentiate(
                up.contiguous(), rows, k, v, answer, total.squeeze(-1), biases[i], causal[i], scale
            )
            own = _back(own, tiles[i], q)
            dq = own if dq is None else dq + own
            grads += [dk, dv]
        return (None, dq, *grads)


def _arranged(x: Tensor, tiles: Tiles | None, k: Tensor) -> Tensor:
    """Rows [X, Y, rows, d] in a part's tiles [X, Y', rows', d]; as they are without tiles."""
    if tiles is None:
        return x
    places = tiles.rows.clamp_min(0)
    return rows_at(x.flatten(1, 2), places).reshape(x.shape[0], k.shape[1], -1, x.shape[-1])


def _back(x: Tensor, tiles: Tiles | None, q: Tensor) -> Tensor:
    """Rows of a part's tiles at the places of the queries q [X, Y, rows, d]."""
    return x if tiles is None else rows_at(x.flatten(1, 2), tiles.back).reshape(*q.shape[:3], x.shape[-1])


def _mixed(out: Tensor, lse: Tensor, other: Tensor, its: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both, from outputs [..., rows, dv] and log-sum-exps [..., rows] over those of each."""
    share = torch.sigmoid(its - lse).nan_to_num(0.0).unsqueeze(-1)  # of the other; rows without any key have none
    return torch.lerp(out.to(share.dtype), other.to(share.dtype), share), torch.logaddexp(lse, its)


def _has_kernel(q: Tensor) -> bool:
    """Whether torch's flash kernel that returns the log-sum-exp is there; in an exported graph it is not."""
    return q.device.type == "cpu" and not torch.compiler.is_exporting()


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One part: out and lse, rows without keys zero and -inf."""
    if _has_kernel(q):
        mask = None if bias is None else bias.to(q.dtype)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        return (out, lse) if bias is None else (out, _mark_dead(lse, bias, causal))
    logits = _logits(q, k, bias, causal, scale)
    lse = torch.logsumexp(logits, -1)
    p = torch.exp(logits - lse.masked_fill(lse == _HIDDEN, 0.0).unsqueeze(-1))
    return (p @ v.to(p.dtype)).to(q.dtype), lse


def _mark_dead(lse: Tensor, bias: Tensor, causal: bool) -> Tensor:
    """The kernel gives 0 for rows without keys; the truth is -inf."""
    seen = bias > _HIDDEN
    if causal:
        rows = torch.arange(lse.shape[-1], device=lse.device).clamp_max(seen.shape[-1] - 1)
        alive = seen.cummax(-1).values if seen.shape[-2] == 1 else (seen & _lower(seen)).any(-1, keepdim=True).mT
        alive = alive[..., 0, rows] if seen.shape[-2] == 1 else alive[..., 0, :]
    else:
        alive = seen.any(-1)
    return lse if bool(alive.all()) else lse.masked_fill(~alive, _HIDDEN)


def _lower(like: Tensor) -> Tensor:
    return torch.ones(like.shape[-2:], dtype=torch.bool, device=like.device).tril()


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = (q.to(kind) @ k.to(kind).mT) * scale
    if bias is not None:
        logits = logits + bias.to(kind)
    return logits.masked_fill(~_lower(logits), _HIDDEN) if causal else logits


def _differentiate(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one part, given the merged output and log-sum-exp."""
    if _has_kernel(q):
        mask = None if bias is None else bias.to(q.dtype)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
        return dq, dk, dv
    p = torch.exp(_logits(q, k, bias, causal, scale) - lse.unsqueeze(-1))
    grad, wide = grad.to(p.dtype), v.to(p.dtype)
    inner = (grad * out.to(p.dtype)).sum(-1, keepdim=True)
    ds = p * (grad @ wide.mT - inner) * scale
    return (ds @ k.to(p.dtype)).to(q.dtype), (ds.mT @ q.to(p.dtype)).to(k.dtype), (p.mT @ grad).to(v.dtype)
