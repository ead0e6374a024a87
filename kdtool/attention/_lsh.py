"""Locality-sensitive hashing by random hyperplanes, and attention to blocks of sorted keys plus sampled ones."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kdtool.attention._flash import Part, hiding, merged
from kdtool.attention._tree import rows_at

_HIDDEN = float("-inf")


def codes(x: Tensor, planes: Tensor) -> Tensor:
    """Hash codes: bit t is set on the positive side of plane t.

    Args:
        x: [..., n, d]
        planes: [d, r]

    Returns:
        [..., n] int64 in 0 .. 2^r - 1.
    """
    bits = (x.to(planes.dtype) @ planes > 0).long()
    return (bits << torch.arange(planes.shape[1], device=x.device)).sum(-1)


def gray_rank(code: Tensor, bits: int) -> Tensor:
    """Place of a code on the walk through all codes that changes one bit a step (inverse Gray code)."""
    shift = 1
    while shift < bits:
        code = code ^ (code >> shift)
        shift *= 2
    return code


def published_rank(code: Tensor) -> Tensor:
    """The rank of the published code: the Gray code itself, whose neighbours may differ in more bits."""
    return code ^ (code >> 1)


def order_of(rank: Tensor) -> Tensor:
    """Positions sorted by rank, ties by position; [..., n]."""
    n = rank.shape[-1]
    return torch.sort(rank * n + torch.arange(n, device=rank.device), dim=-1).values % n


def blocks_and_samples(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_order: Tensor,
    key_order: Tensor,
    bucket: int,
    samples: Tensor | None,
    weights: Tensor | None,
    scale: float,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Each block of sorted queries attends to its block of sorted keys, and to samples of the others.

    Args:
        q: [X, nq, d]
        k: [X, n, d]
        v: [X, n, dv]
        query_order: [X, nq]
        key_order: [X, n]
        bucket: b, keys in a block; the last block may have fewer.
        samples: [X, m] places in the sorted order; None for blocks only.
        weights: [X, m] logarithms of what a sample stands for.
        scale: Factor of the logits.
        valid: [X, n] keys that count; None for all.

    Returns:
        out [X, nq, dv] in the order of q, lse [X, nq].
    """
    sets, nq, width = q.shape
    n = k.shape[1]
    blocks = -(-n // bucket)
    size = -(-nq // blocks)
    sorted_k, sorted_v = rows_at(k, key_order), rows_at(v, key_order)
    hidden = None if valid is None else ~valid.gather(1, key_order)
    fill, more = blocks * bucket - n, blocks * size - nq
    own_k, own_v = (_filled(x, fill).reshape(sets, blocks, bucket, -1) for x in (sorted_k, sorted_v))
    bias = None
    if fill or hidden is not None:
        gone = torch.zeros((sets, n), dtype=torch.bool, device=q.device) if hidden is None else hidden
        gone = functional.pad(gone, (0, fill), value=True).reshape(sets, blocks, 1, bucket)
        bias = hiding(gone)
    rows = _filled(rows_at(q, query_order), more).reshape(sets, blocks, size, width)
    parts = [Part(own_k, own_v, bias)]
    if samples is not None and weights is not None:
        outside = samples.unsqueeze(1) // bucket != torch.arange(blocks, device=q.device)[:, None]
        log_w = weights.unsqueeze(1).masked_fill(~outside, _HIDDEN)
        if hidden is not None:
            log_w = log_w.masked_fill(hidden.gather(1, samples).unsqueeze(1), _HIDDEN)
        drawn_k, drawn_v = (rows_at(x, samples).unsqueeze(1).expand(-1, blocks, -1, -1) for x in (sorted_k, sorted_v))
        parts.append(Part(drawn_k, drawn_v, log_w.unsqueeze(2).float()))
    out, lse = merged(rows, parts, scale)
    places = torch.arange(nq, device=q.device).expand(sets, -1)
    back = torch.zeros_like(query_order).scatter(1, query_order, places)
    return rows_at(out.flatten(1, 2), back), lse.flatten(1, 2).gather(1, back)


def _filled(x: Tensor, rows: int) -> Tensor:
    """Rows of zeros behind those of x [X, n, d]; no copy where there are none."""
    return functional.pad(x, (0, 0, 0, rows)) if rows else x


def log_weights(p: Tensor, samples: Tensor) -> Tensor:
    """log(1 / (m P)) of m samples [X, m] drawn with P [X, n]; -inf where P is 0."""
    chance = p.gather(1, samples)
    return (-torch.log(samples.shape[1] * chance)).masked_fill(chance == 0, _HIDDEN)


Draw = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor], tuple[Tensor, Tensor] | None]
"""What an operator samples: from rows, keys, values, which keys and which rows count (or None), and the keys' order,
the places [X, m] drawn in that order and the logarithms [X, m] of what they stand for; None for no samples."""


def last(rank: Tensor, counts: Tensor | None, bits: int) -> Tensor:
    """Ranks in which what does not count comes last, where it moves nothing else."""
    return rank if counts is None else rank.masked_fill(~counts, 1 << bits)
