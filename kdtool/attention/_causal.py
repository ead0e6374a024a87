"""Causal attention by chunks: exact within a chunk, centroids for groups of like queries of what lies before it.

The keys of a chunk become leaves. Earlier queries are sorted into groups, whose mean queries are landmarks, and for
each landmark the leaves have centroids of their own, exact there to first order. A later query reads the centroids of
the landmark next to it. Landmarks are made anew whenever the text has become four times as long, from all queries
before. So a row depends on itself and on earlier positions, and nothing that comes later moves it, not by a bit.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kdtool.attention._base import Call, counted
from kdtool.attention._blocks import Groups, Leaves, centres, group, leaves_of, opened
from kdtool.attention._flash import Part, Tiles, hiding, merged
from kdtool.attention._tiles import tiles_of
from kdtool.attention._tree import levels_for, rows_at

_HIDDEN = float("-inf")
_TILE = 32
"""Rows of a tile."""
_GROWTH = 4
"""How many times as long a text becomes before landmarks are made anew; all remakings cost a third of the last one."""
_AT_ONCE = 1 << 26
"""Numbers in the centroids of all landmarks and of a chunk's tiles that are held, unless a single set has more."""


def attend_causal(
    q: Tensor, k: Tensor, v: Tensor, call: Call, chunk: int, sizes: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Causal self-attention.

    Args:
        q: [B, Hq, n, d]
        k: [B, Hkv, n, d]
        v: [B, Hkv, n, dv]
        call: Scale and key mask.
        chunk: Keys of a chunk.
        sizes: Largest block, largest leaf, and the number of near leaves.

    Returns:
        out [B, Hq, n, dv] and lse [B, Hq, n].
    """
    batch, heads, n, width = q.shape
    kv = k.shape[1]
    groups = heads // kv
    rows = q.reshape(batch * kv, groups, n, width)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    valid, _ = counted(call, kv, groups, n, n)
    landmarks = groups * chunk // (sizes[0] or groups * chunk) + 1
    tiles = groups * chunk // _TILE + landmarks
    step = max(1, int(_AT_ONCE // ((tiles + landmarks) * n / sizes[1] * (width + v.shape[-1]))))
    outs, sums = [], []
    for first in range(0, len(rows), step):
        own = slice(first, first + step)
        some = (rows[own], k[own], v[own], None if valid is None else valid[own])
        out, lse = _attend(*some, call.scale, chunk, sizes)
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs).reshape(batch, heads, n, -1), torch.cat(sums).reshape(batch, heads, n)


class _Past(NamedTuple):
    """What is read of all chunks so far, in turn.

    Attributes:
        centre: [X, groups, leaves, d + dv] centroids of keys and values.
        bias: [X, groups, leaves] their biases.
        mass: [X, leaves, groups] logs of the leaves' shares of the denominator.
        table: [X, leaves, c, d + dv] the keys and values themselves; None where none is near.
        hidden: [X, leaves, c, 1] places that hold no key; None if all do.
    """

    centre: Tensor
    bias: Tensor
    mass: Tensor
    table: Tensor | None = None
    hidden: Tensor | None = None


def _attend(
    rows: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float, chunk: int, sizes: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Sets of queries [X, G, n, d]: out [X, G, n, dv] and lse [X, G, n]."""
    heads, n = rows.shape[1:3]
    block, leaf, near = sizes
    levels, _ = levels_for(chunk * heads, block or chunk * heads)
    each = 1 << levels_for(chunk, leaf)[0]  # leaves of a chunk
    read = (n - 1) // chunk  # chunks that later ones read
    found = [merged(rows[:, :, :chunk], [_own(rows, k, v, valid, slice(0, chunk))], scale)]
    kept: list[Leaves] = []
    first = 1
    while first <= read:
        last = min(_GROWTH * first, read + 1)  # chunks from first to last - 1 read by these landmarks
        start = first * chunk
        made = _landmarks(rows, k, v, valid, start, chunk, levels)
        new = range(first if kept else 0, min(last, read))
        if new:
            kept.append(_leaves(k, v, valid, made, scale, chunk, new, leaf))
        past = _past(kept, made, scale, rows.dtype, near > 0)
        readers = slice(start, min(last * chunk, n))
        nearest = _nearest(rows[:, :, readers], made)
        reading = None if valid is None else valid[:, readers]
        for number, (of_tile, tiles) in enumerate(_tiles(nearest, reading, made.middle.shape[1], heads, chunk), first):
            here = slice(number * chunk, min((number + 1) * chunk, n))
            parts = _parts(past, number * each, near, of_tile, tiles, rows.shape[-1])
            found.append(merged(rows[:, :, here], [_own(rows, k, v, valid, here), *parts], scale))
        first *= _GROWTH
    return torch.cat([out for out, _ in found], 2), torch.cat([lse for _, lse in found], 2)


def _own(rows: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, here: slice) -> Part:
    """The keys of one chunk, before its own queries."""
    keys, values = (x[:, None, here].expand(-1, rows.shape[1], -1, -1) for x in (k, v))
    return Part(keys, values, None if valid is None else hiding(~valid[:, here])[:, None, None], True)


def _landmarks(
    rows: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, length: int, chunk: int, levels: int
) -> Groups:
    """Groups of the queries before `length`: as many as a chunk has, spread evenly."""
    heads = rows.shape[1]
    some = slice(0, length, length // chunk)
    seen = None if valid is None else valid[:, some]
    real = None if seen is None else seen.repeat(1, heads)
    past = rows[:, :, some].flatten(1, 2)
    return group(past, k[:, some], v[:, some], seen, real, (levels, -(-past.shape[1] >> levels)))


def _leaves(
    k: Tensor, v: Tensor, valid: Tensor | None, made: Groups, scale: float, chunk: int, chunks: range, leaf: int
) -> Leaves:
    """The keys of some chunks [X, chunks leaves, ...], each chunk in leaves of its own."""
    sets, count = len(k), len(chunks)
    past = slice(chunks.start * chunk, chunks.stop * chunk)
    keys, values = (x[:, past].reshape(sets * count, chunk, -1) for x in (k, v))
    seen = None if valid is None else valid[:, past].reshape(sets * count, chunk)
    directions = {name: x.repeat_interleave(count, 0) for name, x in made.directions.items()}
    table, hidden, away, own = leaves_of(keys, values, seen, directions, scale, leaf)
    table, away = (x.reshape(sets, -1, *x.shape[2:]) for x in (table, away))
    if hidden is not None:
        hidden = hidden.reshape(away.shape)
    return Leaves(table, hidden, away, own[::count])


def _past(kept: list[Leaves], made: Groups, scale: float, kind: torch.dtype, whole: bool) -> _Past:
    """Centroids of all leaves so far for each landmark, and with `whole` the leaves themselves."""
    each = [centres(leaves, made.middle.to(leaves.table.dtype), made.share, scale) for leaves in kept]
    centre, bias, mass = (torch.cat(x, dim) for x, dim in zip(zip(*each, strict=True), (2, 2, 1), strict=True))
    if not whole:
        return _Past(centre.to(kind), bias, mass)
    gaps = [leaves.hidden for leaves in kept if leaves.hidden is not None]
    table = torch.cat([leaves.table for leaves in kept], 1).to(kind)
    return _Past(centre.to(kind), bias, mass, table, torch.cat(gaps, 1) if gaps else None)


def _tiles(
    nearest: Tensor, reading: Tensor | None, count: int, heads: int, chunk: int
) -> Iterator[tuple[Tensor, Tiles]]:
    """Tiles of each chunk of readers [X, n G], those of all whole chunks at once."""
    sets, total = nearest.shape
    whole = total // (chunk * heads)
    for first, last, chunks in ((0, whole * chunk, whole), (whole * chunk, total // heads, 1)):
        if first == last:
            continue
        group = nearest[:, first * heads : last * heads].reshape(sets * chunks, -1)
        seen = None if reading is None else reading[:, first:last].reshape(sets * chunks, -1)
        of_tile, tiles = tiles_of(group, seen, count, heads, _TILE)
        of_tile, rows, back = (x.reshape(sets, chunks, -1) for x in (of_tile, *tiles))
        for i in range(chunks):
            yield of_tile[:, i], Tiles(rows[:, i], back[:, i])


def _parts(past: _Past, count: int, near: int, of_tile: Tensor, tiles: Tiles, width: int) -> list[Part]:
    """What a chunk reads of the first `count` leaves: their centroids, and the keys of near ones."""
    centre, bias = past.centre[:, :, :count], past.bias[:, :, :count]
    chosen = None
    if past.table is not None:
        chosen = past.mass[:, :count].mT.topk(min(near, count), dim=-1, sorted=False).indices  # [X, groups, near]
        bias = bias.scatter(2, chosen, _HIDDEN)
    far = rows_at(centre.flatten(2), of_tile).reshape(*of_tile.shape, count, -1)
    parts = [Part(far[..., :width], far[..., width:], rows_at(bias, of_tile).unsqueeze(2), tiles=tiles)]
    if chosen is not None and past.table is not None:
        keys, hidden = opened(past.table, past.hidden, rows_at(chosen, of_tile))
        hidden = None if hidden is None else hidden.unsqueeze(2)
        parts.append(Part(keys[..., :width], keys[..., width:], hidden, tiles=tiles))
    return parts


def _nearest(rows: Tensor, made: Groups) -> Tensor:
    """Number of the group whose mean query is next to each row [X, G, n, d], position after position: [X, n G]."""
    directions = made.directions["query_features"]
    landmarks = made.middle.float() @ directions
    away = landmarks.square().sum(-1)
    if made.empty is not None:
        away = away.masked_fill(made.empty, float("inf"))
    own = rows.transpose(1, 2).flatten(1, 2).float() @ directions
    return torch.baddbmm(away.unsqueeze(1), own, landmarks.mT, alpha=-2.0).argmin(-1)
