"""Nystromformer: attention through landmarks, the means of segments of the queries and of the keys.

With landmarks Q~ and K~, the softmax matrices F = (Q, K~), A = (Q~, K~) and B = (Q~, K), and Z the iterated
pseudo-inverse of A: out = F Z B V. Added to the published form: masked positions belong to no segment, a segment
counts by its length, and what Z lacks of rows of sum 1 goes to the mean of the landmarks' answers, so that equal
values come out as they are however far the iteration got. Causal and cross attention are computed exactly: a mean
over a segment holds what comes later, and segments of other queries are not those of the keys.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kdtool.attention import exact
from kdtool.attention._base import Call, State, repeat_heads, short
from kdtool.attention._flash import Part, merged

paper: str = (
    "Xiong et al., Nystromformer: A Nystrom-based Algorithm for Approximating Self-Attention, AAAI 2021, "
    "arXiv 2102.03902"
)
causal: bool = False

_HIDDEN = float("-inf")


@dataclass(frozen=True, slots=True)
class Config:
    """Number of landmarks, and work on the pseudo-inverse."""

    landmarks: Annotated[int, Field(ge=1)] = 64
    """Segments of the queries and of the keys; with no more keys than this attention is exact."""
    iterations: Annotated[int, Field(ge=1)] = 6
    """Steps of the pseudo-inverse."""
    min_length: Annotated[int, Field(ge=0)] = 4096
    """Fewer keys than this are attended to exactly."""


def segments(n: int, count: int, valid: Tensor | None, device: torch.device) -> Tensor:
    """Which segment a position belongs to: the valid ones, in their order, in `count` runs of nearly equal length.

    Args:
        n: Positions.
        count: Segments.
        valid: [B, n] positions that count; None for all.
        device: Where to put the result.

    Returns:
        [B or 1, count, n] float32, 1 where a position belongs to a segment. With fewer valid positions than
        segments some segments are empty.
    """
    seen = torch.ones((1, n), dtype=torch.bool, device=device) if valid is None else valid
    place = seen.long().cumsum(-1) - 1
    own = place * count // seen.sum(-1, keepdim=True).clamp_min(1)
    return ((own.unsqueeze(1) == torch.arange(count, device=device)[:, None]) & seen.unsqueeze(1)).float()


def means(x: Tensor, member: Tensor) -> Tensor:
    """Means of segments.

    Args:
        x: [B, H, n, d]
        member: [B or 1, count, n] as of `segments`.

    Returns:
        [B, H, count, d]; zero for an empty segment.
    """
    batch, heads, n, width = x.shape
    sums = member.to(x.dtype) @ x.transpose(1, 2).reshape(batch, n, heads * width)
    sums = sums / member.sum(-1, keepdim=True).clamp_min(1.0)
    return sums.reshape(batch, -1, heads, width).transpose(1, 2)


def inverse(a: Tensor, iterations: int) -> Tensor:
    """Pseudo-inverse of matrices with rows of sum 1, by an iteration of third order from A^T / (|A|_1 |A|_inf).

    Args:
        a: [..., m, m]
        iterations: Steps; each multiplies what is left of small singular values by about 3.

    Returns:
        [..., m, m]
    """
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    size = a.sum(-2).amax(-1) * a.sum(-1).amax(-1)
    z = a.mT / size[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13.0 * eye - az @ (15.0 * eye - az @ (7.0 * eye - az)))
    return z


def attend(
    q: Tensor, k: Tensor, v: Tensor, call: Call, config: Config | None = None, state: State | None = None
) -> tuple[Tensor, Tensor]:
    """Approximate self-attention; exact with no more keys than landmarks, causal, across, with windows and biases.

    Args:
        q: [B, Hq, nq, d]
        k: [B, Hkv, n, d]
        v: [B, Hkv, n, dv]
        call: Scale, key mask.
        config: Settings.
        state: Not used.

    Returns:
        out [B, Hq, nq, dv] and lse [B, Hq, nq], the log of the denominator estimated by the landmarks of the keys.
    """
    c = config or Config()
    heads, n = q.shape[1], k.shape[2]
    general = call.causal or call.window is not None or call.bias is not None or q.shape[2] != n
    if general or n <= c.landmarks or short(call, heads // k.shape[1], n, n, c.min_length):
        return exact.attend(q, k, v, call)
    # the pseudo-inverse has large entries of both signs: what it multiplies must not be rounded to half precision
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows, keys, values = q.to(kind), k.to(kind), v.to(kind)
    valid = call.key_mask
    if valid is not None:
        hidden = ~valid[:, None, :, None]
        rows, keys, values = (x.masked_fill(hidden, 0.0) for x in (rows, keys, values))
    member = segments(n, c.landmarks, valid, q.device)
    share = member.sum(-1).to(kind)[:, None]  # [B or 1, 1, m]: positions of a segment
    marks_q, marks_k = means(rows, member), repeat_heads(means(keys, member), heads)
    weight = torch.log(share).unsqueeze(2)
    bias = None if valid is None else torch.zeros_like(valid, dtype=kind).masked_fill(~valid, _HIDDEN)[:, None, None]
    answers, _ = merged(marks_q, [Part(repeat_heads(keys, heads), repeat_heads(values, heads), bias)], call.scale)
    z = inverse(_between(marks_q, marks_k, weight, call.scale), c.iterations)
    present = (share > 0).to(kind)
    present = present / present.sum(-1, keepdim=True).clamp_min(1.0)
    middle = present.unsqueeze(2) @ answers
    away = (answers - middle) * (share > 0).unsqueeze(-1)
    out, lse = merged(rows, [Part(marks_k, z @ away + middle, weight)], call.scale)
    if valid is not None:
        out = out.masked_fill(~valid.any(-1)[:, None, None, None], 0.0)
    return out.to(q.dtype), lse


def _between(marks_q: Tensor, marks_k: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Softmax matrix of the landmarks [B, H, m, m]; an empty segment sees itself alone, which keeps it apart."""
    logits = marks_q @ marks_k.mT * scale + weight
    eye = torch.log(torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device))
    return torch.softmax(torch.where(weight.mT == _HIDDEN, eye, logits), -1)
