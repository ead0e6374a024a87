"""Causal attention to hashed blocks and samples, by halving, without a look ahead.

Chunks attend exactly to themselves. What comes before a chunk falls into segments of doubling length, one for each bit
that is set in the chunk's number; the keys of a segment are hashed, sorted and sampled once. The published form sorts
the queries of a half together, so that later ones move earlier ones. Here a query finds its block of keys by itself:
the block in which its hash would be sorted. Queries of a chunk that found the same block fill tiles in the order of
their positions, so that their places within a tile depend on earlier ones alone, too.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kdtool.attention._base import Call, counted, generator
from kdtool.attention._flash import Part, hiding, merged
from kdtool.attention._lsh import Draw, codes, gray_rank, last, order_of
from kdtool.attention._tiles import tiles_of
from kdtool.attention._tree import rows_at

_HIDDEN = float("-inf")
_TILE = 64
"""Rows of a tile."""


class Segment(NamedTuple):
    """Sorted keys.

    Attributes:
        k: [X, blocks, b, d]
        v: [X, blocks, b, dv]
        hidden: [X, blocks, b] places that hold no key.
        first: [X, blocks] rank of the first key of a block.
        samples: [X, m] places in the sorted order; None for blocks only.
        weights: [X, m] logarithms of what a sample stands for.
    """

    k: Tensor
    v: Tensor
    hidden: Tensor
    first: Tensor
    samples: Tensor | None
    weights: Tensor | None


def halved(
    q: Tensor, k: Tensor, v: Tensor, call: Call, bucket: int, projections: int, chunk: int, draw: Draw
) -> tuple[Tensor, Tensor]:
    """Causal self-attention.

    Args:
        q: [B, Hq, n, d]
        k: [B, Hkv, n, d]
        v: [B, Hkv, n, dv]
        call: Scale, key mask, seed.
        bucket: Keys in a block.
        projections: Hyperplanes of the hash.
        chunk: Keys of a chunk.
        draw: Chooses the samples of a segment.

    Returns:
        out [B, Hq, n, dv] and lse [B, Hq, n].
    """
    batch, heads, n, width = q.shape
    kv = k.shape[1]
    groups = heads // kv
    rows = q.reshape(batch * kv, groups, n, width)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    valid, _ = counted(call, kv, groups, n, n)
    planes = torch.randn(width, projections, generator=generator(call.seed, q.device), device=q.device)
    with torch.no_grad():
        rank_q = gray_rank(codes(rows.float(), planes), projections)
        rank_k = last(gray_rank(codes(k.float(), planes), projections), valid, projections)
    segments: dict[tuple[int, int], Segment] = {}
    outs, sums = [], []
    for number in range(-(-n // chunk)):
        own = slice(number * chunk, min((number + 1) * chunk, n))
        seen = None if valid is None else valid[:, own]
        bias = None if seen is None else hiding(~seen)[:, None, None]
        own_k, own_v = (x[:, None, own].expand(-1, groups, -1, -1) for x in (k, v))
        parts = [Part(own_k, own_v, bias, True)]
        for bounds in _before(number, chunk):
            if bounds not in segments:
                before = slice(*bounds)
                some = None if valid is None else valid[:, before]
                segments[bounds] = _segment(
                    rows[:, :, before].flatten(1, 2), k[:, before], v[:, before], some, rank_k[:, before], bucket, draw
                )
            parts += _parts(segments[bounds], rank_q[:, :, own], seen)
        out, lse = merged(rows[:, :, own], parts, call.scale)
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs, 2).reshape(batch, heads, n, -1), torch.cat(sums, 2).reshape(batch, heads, n)


def _before(number: int, chunk: int) -> list[tuple[int, int]]:
    """What lies before a chunk, in segments of a power of two of chunks that start at a multiple of their length."""
    found: list[tuple[int, int]] = []
    start = 0
    for bit in reversed(range(number.bit_length())):
        if number >> bit & 1:
            found.append((start * chunk, (start + (1 << bit)) * chunk))
            start += 1 << bit
    return found


def _segment(
    rows: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, rank: Tensor, bucket: int, draw: Draw
) -> Segment:
    """Sort the keys of a segment by their ranks, and draw samples of them."""
    sets, n, _ = k.shape
    with torch.no_grad():
        order = order_of(rank)
        real = None if valid is None else valid.repeat(1, rows.shape[1] // n)
        samples, weights = draw(rows, k, v, valid, real, order) or (None, None)
    fill = -n % bucket
    hidden = torch.zeros_like(rank, dtype=torch.bool) if valid is None else ~valid.gather(1, order)
    hidden = functional.pad(hidden, (0, fill), value=True).reshape(sets, -1, bucket)
    sorted_k, sorted_v = (
        functional.pad(rows_at(x, order), (0, 0, 0, fill)).reshape(sets, -1, bucket, x.shape[-1]) for x in (k, v)
    )
    return Segment(sorted_k, sorted_v, hidden, rank.gather(1, order)[:, ::bucket].contiguous(), samples, weights)


def _parts(segment: Segment, rank: Tensor, seen: Tensor | None) -> list[Part]:
    """The block of each query [X, G, rows] by its rank, and the samples of the other blocks."""
    sets, groups, _ = rank.shape
    blocks, bucket = segment.hidden.shape[1:]
    with torch.no_grad():
        flat = rank.transpose(1, 2).flatten(1)  # position after position
        block = (torch.searchsorted(segment.first, flat.contiguous(), right=True) - 1).clamp_min(0)
        of_tile, tiles = tiles_of(block, seen, blocks, groups, _TILE)
    picked_k, picked_v = (
        rows_at(x.flatten(2), of_tile).reshape(sets, -1, *x.shape[2:]) for x in (segment.k, segment.v)
    )
    gone = rows_at(segment.hidden, of_tile).unsqueeze(2)
    found = [Part(picked_k, picked_v, hiding(gone) if bool(gone.any()) else None, tiles=tiles)]
    if segment.samples is not None and segment.weights is not None:
        outside = segment.samples.unsqueeze(1) // bucket != of_tile.unsqueeze(2)
        away = segment.hidden.flatten(1).gather(1, segment.samples).unsqueeze(1)
        bias = segment.weights.unsqueeze(1).masked_fill(~outside | away, _HIDDEN).unsqueeze(2).float()
        drawn_k, drawn_v = (
            rows_at(x.flatten(1, 2), segment.samples).unsqueeze(1).expand(-1, of_tile.shape[1], -1, -1)
            for x in (segment.k, segment.v)
        )
        found.append(Part(drawn_k, drawn_v, bias, tiles=tiles))
    return found
