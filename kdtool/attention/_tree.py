"""Balanced trees over keys (or queries): every level splits each node at the median of its main direction.

Shapes: X independent sets, n points, m features, L = 2^levels leaves of c points each, L c >= n. Places
without a point (the set is not a multiple, or the point is masked) go to the end of the order, so that
whole leaves become empty rather than every leaf a little.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_POWER_STEPS = 2
_MOMENT_ROWS = 256
"""About as many points of a node give its main direction."""


def levels_for(n: int, leaf: int) -> tuple[int, int]:
    """Levels and leaf size c <= leaf of a balanced tree over n points.

    Args:
        n: Number of points.
        leaf: Largest leaf.

    Returns:
        levels, with 2^levels leaves, and c = ceil(n / 2^levels).
    """
    levels = 0
    while n > leaf << levels:
        levels += 1
    return levels, -(-n // (1 << levels))


def leaf_order(y: Tensor, valid: Tensor | None, levels: int, size: int) -> Tensor:
    """Order of the points in which each leaf is `size` consecutive places.

    Args:
        y: [X, n, m] features; distances between them say which points belong together.
        valid: [X, n] bool, False for points that do not count; None if all do.
        levels: Number of splits.
        size: Points in a leaf.

    Returns:
        [X, 2^levels size] int64: numbers of points; n and above for places without a point.
    """
    sets, n, _ = y.shape
    total = size << levels
    hidden = torch.zeros((sets, n), dtype=torch.bool, device=y.device) if valid is None else ~valid
    y = y if valid is None else y.masked_fill(hidden.unsqueeze(-1), 0.0)
    if total > n:
        y = functional.pad(y, (0, 0, 0, total - n))
        hidden = functional.pad(hidden, (0, total - n), value=True)
    plain = total == n and valid is None
    order = torch.arange(total, device=y.device).expand(sets, total)
    for level in range(levels):
        nodes, count = sets * (1 << level), total >> level
        points = y.reshape(nodes, count, -1)
        absent = None if plain else hidden.reshape(nodes, count)
        split = _halves(_along(points, absent), count // 2)
        order = order.reshape(nodes, count).gather(1, split)
        if level < levels - 1:
            y = rows_at(points, split)
            hidden = hidden if absent is None else absent.gather(1, split)
    return order.reshape(sets, total)


def rows_at(x: Tensor, places: Tensor) -> Tensor:
    """Rows of x [X, n, d] at places [X, m]: [X, m, d].

    Whole rows are copied, which is several times as fast as `gather` with an index for every element.
    """
    sets, n, width = x.shape
    first = torch.arange(sets, device=x.device).unsqueeze(1) * n
    return x.reshape(sets * n, width).index_select(0, (places + first).reshape(-1)).reshape(sets, -1, width)


def _along(points: Tensor, absent: Tensor | None) -> Tensor:
    """Coordinates [S, p] of points [S, p, m] along their node's main direction; absent ones last."""
    step = max(1, points.shape[1] // _MOMENT_ROWS)
    some = points[:, ::step]
    if absent is None:
        centred = some - some.mean(1, keepdim=True)
    else:
        away = absent[:, ::step].unsqueeze(-1)
        count = (~away).sum(1, keepdim=True).clamp_min(1).to(points.dtype)
        centred = (some - some.sum(1, keepdim=True) / count).masked_fill(away, 0.0)
    moments = centred.mT @ centred  # [S, m, m]
    # the column of the largest variance is a start that is never orthogonal to the main direction's strongest part
    start = torch.diagonal(moments, dim1=1, dim2=2).argmax(-1)
    direction = moments.gather(2, start[:, None, None].expand(-1, moments.shape[1], 1))
    for _ in range(_POWER_STEPS):
        direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-30)
        direction = moments @ direction
    direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-30)
    along: Tensor = (direction.mT @ points.mT).squeeze(1)
    return along if absent is None else along.masked_fill(absent, float("inf"))


def _halves(along: Tensor, half: int) -> Tensor:
    """Numbers of the points, those of the smaller coordinates first, [S, 2 half]; no order within a half."""
    if along.device.type == "cpu" and not torch.compiler.is_compiling():
        # one selection for both halves, ten times as fast as two calls of topk
        split: Tensor = torch.from_numpy(np.argpartition(along.numpy(), half, axis=1))
        return split
    lower = torch.topk(along, half, dim=1, largest=False, sorted=False).indices
    taken = torch.zeros_like(along).scatter_(1, lower, 1.0)
    upper = torch.topk(taken, half, dim=1, largest=False, sorted=False).indices
    return torch.cat([lower, upper], 1)
