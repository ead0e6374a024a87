"""Which dimensions weight-inherited distillation drops, and when (WID, section 3.3).

H hidden, H_s the target, d head size, A = H / d heads; k counts intervals of the schedule.
"""

from typing import Literal

import torch
from torch import Tensor

Strategy = Literal["dim", "head"]

DENSE_INTERVALS = 16
"""Intervals in which feed-forward and head-transform sets reach their target."""
DIM_INTERVALS = 8
"""Intervals in which each attention head reaches its smaller size."""


def column_norms(inner: Tensor) -> Tensor:
    """Score of each dimension: the L2 norm of its column in an in-compactor [n, n]; gives [n]."""
    norms: Tensor = torch.linalg.vector_norm(inner, dim=0)
    return norms


def dense_drops(k: int, size: int, target: int) -> int:
    """How many of `size` dimensions a feed-forward or head-transform set has dropped after `k` intervals."""
    return min(int(k * (size - target) / DENSE_INTERVALS), size - target)


def keep_smallest_out(norms: Tensor, drops: int) -> Tensor:
    """Mask [n] bool that drops the `drops` smallest scores; of ties, those with the lower index."""
    keep = torch.ones_like(norms, dtype=torch.bool)
    keep[norms.argsort(stable=True)[:drops]] = False
    return keep


def keep_attention(
    norms: Tensor, k: int, target: int, head_size: int, strategy: Strategy, fractional: bool = False
) -> Tensor:
    """Mask [H] bool of an attention set or of the residual stream after `k` intervals.

    Args:
        norms: Scores [H].
        k: Intervals passed.
        target: Dimensions to keep in the end.
        head_size: Size d of a head.
        strategy: `dim` makes every head smaller, `head` drops whole heads.
        fractional: Spread what a head loses evenly over the intervals. The published increment, an eighth
            rounded down, is zero for heads that lose fewer than eight dimensions: they would lose none.
    """
    hidden = len(norms)
    heads = hidden // head_size
    blocks = norms.reshape(heads, head_size)
    if strategy == "head":
        gone = min(k // 2, (hidden - target) // head_size)
        return keep_smallest_out(blocks.sum(1), gone).repeat_interleave(head_size)
    each = int((hidden - target) / heads)
    gone = k * each // DIM_INTERVALS if fractional else k * (each // DIM_INTERVALS)
    if gone * heads > hidden - target:
        gone = each
    return torch.stack([keep_smallest_out(block, gone) for block in blocks]).reshape(hidden)


def intervals(hidden: int, target: int, head_size: int, strategy: Strategy) -> int:
    """Intervals after which all sets have reached their target.

    Args:
        hidden: Dimensions H of the residual stream.
        target: Dimensions to keep in the end; a whole number in each head, or of whole heads.
        head_size: Size d of a head.
        strategy: As for `keep_attention`.
    """
    if strategy == "head":
        return max(DENSE_INTERVALS, 2 * (hidden - target) // head_size)
    each = (hidden - target) * head_size // hidden
    increment = each // DIM_INTERVALS
    return max(DENSE_INTERVALS, -(-each // increment) if increment else DIM_INTERVALS)
