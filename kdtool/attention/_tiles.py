"""Rows that chose the same group of keys, in tiles of a fixed size, without a look ahead.

Rows of a group stand in the order of their positions, so that the place of a row within its tile depends on earlier
rows alone: later ones do not move it, not even by the rounding of another place.
"""

import torch
from torch import Tensor

from kdtool.attention._flash import Tiles


def tiles_of(
    group: Tensor, seen: Tensor | None, there: Tensor | None, count: int, heads: int, size: int
) -> tuple[Tensor, Tiles]:
    """Sort rows into tiles by the group that each chose.

    Args:
        group: [X, rows H] number of the group of each row, position after position.
        seen: [X, rows] positions that count; the others stand in tiles of their own. None if all do.
        there: [X, rows] positions that exist; the others stand nowhere. None if all do.
        count: How many groups there are.
        heads: H, query heads that share a set of keys.
        size: Rows of a tile.

    Returns:
        [X, tiles] number of the group of each tile, and the places; rows are numbered head after head.
    """
    sets, total = group.shape
    kinds = count
    if seen is not None:
        group = group + count * (~seen).repeat_interleave(heads, 1)
        kinds = 2 * count
    if there is not None:
        group = group.masked_fill(~there.repeat_interleave(heads, 1), kinds)
    order = torch.argsort(group, dim=1, stable=True)
    own = group.gather(1, order)  # in ascending order
    members = torch.zeros((sets, kinds + 1), dtype=torch.int64, device=group.device)
    members.scatter_add_(1, group, torch.ones_like(group))
    full = (members[:, :kinds] + size - 1) // size
    ends = full.cumsum(1)
    tiles = max(1, int(ends[:, -1].max()))
    start = torch.cat([ends - full, torch.full_like(ends[:, :1], tiles)], 1)
    first = members.cumsum(1) - members
    place = (start * size - first).gather(1, own) + torch.arange(total, device=group.device)
    away = own == kinds
    spare = tiles * size  # where the rows go that do not exist
    number = order % heads * (total // heads) + order // heads
    rows = torch.full((sets, spare + 1), -1, device=group.device)
    rows = rows.scatter(1, place.masked_fill(away, spare), number)[:, :spare]
    back = torch.empty_like(group).scatter(1, number, place.masked_fill(away, -1))
    tile = torch.arange(tiles, device=group.device).expand(sets, -1).contiguous()
    return torch.searchsorted(ends, tile, right=True).clamp_max(kinds - 1) % count, Tiles(rows, back)
