"""Exact softmax attention.

out_i = sum_j softmax_j(scale q_i . k_j + bias_ij) v_j. With a sliding window and as many queries as
keys the cost is n * window: blocks as long as the window see themselves and their neighbours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kdtool.attention._base import Call, State, repeat_heads
from kdtool.attention._flash import Part, hiding, merged

paper: str = "Vaswani et al., Attention Is All You Need, 2017, arXiv 1706.03762"
causal: bool = True
_HIDDEN = float("-inf")


@dataclass(frozen=True, slots=True)
class Config:
    """Exact attention has no settings."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, call: Call, config: Config | None = None, state: State | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over all keys that a query sees.

    Args:
        q: [B, Hq, nq, d]
        k: [B, Hkv, n, d]
        v: [B, Hkv, n, dv]
        call: Scale, masks, bias.
        config: Not used.
        state: Not used.

    Returns:
        out [B, Hq, nq, dv] and lse [B, Hq, nq].
    """
    if call.key_mask is None and call.window is None and call.bias is None and q.shape == k.shape == v.shape:
        return merged(q, [Part(k, v, None, call.causal)], call.scale)  # what short inputs have time for
    heads = q.shape[1]
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    nq, n = q.shape[2], k.shape[2]
    if call.window is not None and call.bias is None and nq == n and n > 2 * call.window:
        return _banded(q, k, v, call)
    hidden = hidden_bias(call, nq, n, q.device)
    bias = hidden if call.bias is None else (call.bias if hidden is None else call.bias + hidden)
    aligned = call.causal and call.window is None and nq == n
    return merged(q, [Part(k, v, bias, aligned)], call.scale)


def hidden_bias(call: Call, nq: int, n: int, device: torch.device) -> Tensor | None:
    """0 where a key is seen and -inf where not, broadcastable to [B, H, nq, n]; None if all is seen.

    Causal masks of square attention are left to the kernel.
    """
    bias: Tensor | None = None
    if call.key_mask is not None:
        bias = hiding(~call.key_mask)[:, None, None]
    if call.window is not None or (call.causal and nq != n):
        distance = torch.arange(n - nq, n, device=device)[:, None] - torch.arange(n, device=device)
        away = distance < 0 if call.causal else torch.zeros_like(distance, dtype=torch.bool)
        if call.window is not None:
            away = away | (distance >= call.window if call.causal else distance.abs() > call.window)
        banned = hiding(away)[None, None]
        bias = banned if bias is None else bias + banned
    return bias


def _banded(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Sliding-window attention by blocks of the window's length: each sees itself and its neighbours."""
    assert call.window is not None
    batch, heads, n, _ = q.shape
    size = call.window
    sides = (size, 0) if call.causal else (size, size)
    fill = -n % size
    q = functional.pad(q, (0, 0, 0, fill))
    around = (0, 0, sides[0], sides[1] + fill)
    k, v = functional.pad(k, around), functional.pad(v, around)
    span = size + sum(sides)
    # [B H, blocks, span, d]: overlapping views of the keys around each block
    k, v = (x.flatten(0, 1).unfold(1, span, size).mT for x in (k, v))
    place = torch.arange(q.shape[2], device=q.device).view(-1, size)  # [blocks, size]
    keys = torch.arange(span, device=q.device) + place[:, :1] - size  # [blocks, span]
    distance = place[:, :, None] - keys[:, None]
    away = (distance < 0) | (distance >= size) if call.causal else distance.abs() > size
    bias = hiding(away | ((keys < 0) | (keys >= n))[:, None])[None]
    q = q.reshape(batch * heads, -1, size, q.shape[-1])
    if call.key_mask is None:
        out, lse = merged(q, [Part(k, v, bias)], call.scale)
    else:
        seen = functional.pad(call.key_mask, (sides[0], sides[1] + fill)).unfold(1, span, size)
        each = []
        for row in range(batch):  # one after the other: heads share a mask, which is as large as all their logits
            own = slice(row * heads, (row + 1) * heads)
            mask = bias + hiding(~seen[row])[None, :, None]
            each.append(merged(q[own], [Part(k[own], v[own], mask)], call.scale))
        out, lse = (torch.cat(parts) for parts in zip(*each, strict=True))
    return (
        out.reshape(batch, heads, -1, out.shape[-1])[:, :, :n],
        lse.reshape(batch, heads, -1)[:, :, :n],
    )
