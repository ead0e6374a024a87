"""Rows that chose the same group of keys, in tiles of a fixed size, without a look ahead.

Rows of a group stand in the order of their positions, so that the place of a row within its tile depends on earlier
rows alone: later ones do not move it, not even by the rounding of another place.
"""

import torch
from torch import Tensor

from kdtool.attention._flash import Tiles


def tiles_of(group: Tensor, seen: Tensor | None, count: int, heads: int, size: int) -> tuple[Tensor, Tiles]:
    """Sort rows into tiles by the group that each chose.

    Args:
        group: [X, rows H] number of the group of each row, position after position.
        seen: [X, rows] positions that count; the others stand in tiles of their own. None if all do.
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
    order = torch.argsort(group, dim=1, stable=True)
    own = group.gather(1, order)  # in ascending order
    members = torch.zeros((sets, kinds), dtype=torch.int64, device=group.device)
    members.scatter_add_(1, group, torch.ones_like(group))
    full = (members + size - 1) // size
    ends = full.cumsum(1)
    tiles = int(ends[:, -1].max())
    skipped = (ends - full) * size - (members.cumsum(1) - members)  # places left free before a group
    place = skipped.gather(1, own) + torch.arange(total, device=group.device)
    number = order % heads * (total // heads) + order // heads
    rows = torch.full((sets, tiles * size), -1, device=group.device).scatter_(1, place, number)
    back = torch.empty_like(group).scatter_(1, number, place)
    tile = torch.arange(tiles, device=group.device).expand(sets, -1).contiguous()
    return torch.searchsorted(ends, tile, right=True).clamp_max(kinds - 1) % count, Tiles(rows, back)
