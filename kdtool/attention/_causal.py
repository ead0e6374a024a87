"""Causal attention by halving: exact within a chunk, centroids for groups of like queries of what lies before it.

What lies before a chunk falls into segments of doubling length, each read by as many positions as it has. The keys of a
segment become leaves; its own queries are sorted into blocks, whose mean queries are landmarks, and for each landmark
the leaves have centroids of their own, exact there to first order. A later query reads the centroids of the landmark
next to it. So a row depends on itself and on earlier positions, and nothing that comes later moves it, not by a bit.
"""

import torch
from torch import Tensor
from torch.nn import functional

from kdtool.attention._base import Call, counted
from kdtool.attention._blocks import Layout, centres, lay_out, leaves_of, opened
from kdtool.attention._flash import Part, Tiles, hiding, merged
from kdtool.attention._leaves import present_in
from kdtool.attention._tiles import tiles_of
from kdtool.attention._tree import levels_for, rows_at

_HIDDEN = float("-inf")
_TILE = 64
"""Rows of a tile."""
_AT_ONCE = 1 << 26
"""Numbers in the centroids of all tiles that are held at a time, unless a single set has more."""


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
    outs, sums = [], []
    tiles = groups * n // 2 * (1 / _TILE + 1 / sizes[0])
    step = max(1, int(_AT_ONCE // (tiles * n / 2 / sizes[1] * (width + v.shape[-1]))))
    for first in range(0, len(rows), step):
        own = slice(first, first + step)
        some = (rows[own], k[own], v[own], None if valid is None else valid[own])
        parts, length = [_own(*some, chunk)], chunk
        while length < n:
            parts += _before(*some, call.scale, length, sizes)
            length *= 2
        out, lse = merged(rows[own], parts, call.scale)
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs).reshape(batch, heads, n, -1), torch.cat(sums).reshape(batch, heads, n)


def _own(rows: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, chunk: int) -> Part:
    """Chunks of queries [X, G, n, d], each before the keys of its own positions."""
    sets, heads, n, _ = rows.shape
    chunks = -(-n // chunk)
    total = chunks * chunk

    def chunked(x: Tensor) -> Tensor:
        """[X, n, .] to [X, G chunks, chunk, .]."""
        cut = functional.pad(x, (0, 0, 0, total - n)).reshape(sets, 1, chunks, chunk, -1)
        return cut.expand(-1, heads, -1, -1, -1).flatten(1, 2)

    bias = None if valid is None else hiding(~chunked(valid.unsqueeze(-1))).mT
    place = torch.arange(total, device=k.device)
    head = torch.arange(heads, device=k.device)[:, None]
    numbers = (place + head * n).masked_fill(place >= n, -1).reshape(1, -1).expand(sets, -1)
    back = (place[:n] + head * total).reshape(1, -1).expand(sets, -1)
    return Part(chunked(k), chunked(v), bias, True, Tiles(numbers, back))


def _before(
    rows: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float, length: int, sizes: tuple[int, int, int]
) -> list[Part]:
    """All segments of one length for the positions that read them: centroids, and the keys of near leaves."""
    sets, heads, n, _ = rows.shape
    pairs = (n + length - 1) // (2 * length)
    keys, values, past = (_paired(x, length, pairs, 0) for x in (k, v, rows))
    readers = _paired(rows, length, pairs, length)
    seen, real, reading, there = None, None, None, None
    if valid is not None:
        seen, reading = (_paired(valid.unsqueeze(-1), length, pairs, offset).squeeze(-1) for offset in (0, length))
        real = seen.repeat(1, heads)
    if n < 2 * pairs * length:
        there = _paired(k.new_ones((sets, n, 1), dtype=torch.bool), length, pairs, length).squeeze(-1)
    made = lay_out(past.flatten(1, 2), keys, values, seen, real, scale, sizes, None)
    kind = torch.float64 if k.dtype == torch.float64 else torch.float32
    leaves = leaves_of(keys.to(kind), values.to(kind), seen, made, levels_for(length, sizes[1])[1])
    with torch.no_grad():
        group = _nearest(readers.transpose(1, 2).flatten(1, 2), made, real)
        of_tile, tiles = tiles_of(group, reading, there, made.middle.shape[1], heads, _TILE)
        tiles = _placed(tiles, rows, length, pairs)
    centre, bias, mass = centres(leaves, made.middle.to(kind), made.share, scale)
    near = min(sizes[2], mass.shape[1])
    chosen = mass.mT.topk(near, dim=-1, sorted=False).indices  # [X pairs, blocks, near]
    if near:
        bias = bias.scatter(2, chosen, _HIDDEN)

    def part(table: Tensor, bias: Tensor | None) -> Part:
        """Keys and values side by side [X pairs, tiles, keys, .], and the bias [X pairs, tiles, keys]."""
        width, wide, _ = leaves.parts
        table = table.reshape(sets, -1, *table.shape[2:]).to(rows.dtype)
        if bias is not None:
            bias = bias.reshape(sets, -1, 1, bias.shape[-1])
        return Part(table[..., :width], table[..., width : width + wide], bias, tiles=tiles)

    shown = sum(leaves.parts[:2])
    far = rows_at(centre[..., :shown].flatten(2), of_tile).reshape(*of_tile.shape, -1, shown)
    found = [part(far, rows_at(bias, of_tile))]
    if near:
        found.append(part(*opened(leaves, rows_at(chosen, of_tile))))
    return found


def _paired(x: Tensor, length: int, pairs: int, offset: int) -> Tensor:
    """From every 2 length positions of x [X, ..., n, d] those from `offset` on: [X pairs, ..., length, d]."""
    cut = [x[..., first : first + length, :] for first in range(offset, 2 * length * pairs, 2 * length)]
    cut[-1] = functional.pad(cut[-1], (0, 0, 0, length - cut[-1].shape[-2]))
    return torch.stack(cut, 1).flatten(0, 1)


def _nearest(own: Tensor, made: Layout, real: Tensor | None) -> Tensor:
    """Number of the block whose mean query is next to each row [X, rows, d]: [X, rows]."""
    directions = made.directions["query_features"]
    landmarks = made.middle.float() @ directions
    away = landmarks.square().sum(-1)
    if real is not None:
        counts = present_in(made.query_order, real.shape[1], real)
        assert counts is not None
        away = away.masked_fill(~counts.reshape(*away.shape, -1).any(-1), float("inf"))
    return torch.baddbmm(away.unsqueeze(1), own.float() @ directions, landmarks.mT, alpha=-2.0).argmin(-1)


def _placed(tiles: Tiles, rows: Tensor, length: int, pairs: int) -> Tiles:
    """Tiles of the readers of single segments [X pairs, .], among all rows of a set."""
    sets, heads, n, _ = rows.shape
    number = tiles.rows.reshape(sets, pairs, -1)
    pair = torch.arange(pairs, device=rows.device)[:, None]
    placed = number // length * n + number % length + (2 * pair + 1) * length
    own = tiles.back.reshape(sets, pairs, heads, length)
    own = (own + pair[..., None] * number.shape[-1]).masked_fill(own < 0, -1)
    back = torch.full((sets, heads, n), -1, device=rows.device)
    for i in range(pairs):
        readers = back[:, :, (2 * i + 1) * length : (2 * i + 2) * length]
        readers.copy_(own[:, i, :, : readers.shape[2]])
    return Tiles(placed.masked_fill(number < 0, -1).flatten(1), back.flatten(1))
