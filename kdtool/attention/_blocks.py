"""Blocks of like queries, each with its own centroids of the same leaves of keys.

At the mean query of a block every centroid, its value and its bias are exact to first order: with
w_j ~ exp(s q_b.k_j) within leaf c, k_c = sum w k, v_c = sum w v and bias_c = log sum exp(s q_b.k_j) - s q_b.k_c, the
leaf's numerator and denominator are those of exact attention at q_b, and the denominator's gradient, too. Half the
variance of a leaf's logits over the block, to second order what the denominator grows by, is added to the bias.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kdtool.attention._base import State
from kdtool.attention._flash import Part, hiding, merged
from kdtool.attention._leaves import (
    FEATURES,
    key_features,
    key_order,
    ordered,
    pick,
    present_in,
    rows_for_moments,
    value_features,
)
from kdtool.attention._tree import leaf_order, levels_for, rows_at

_HIDDEN = float("-inf")
_SPREAD_ROWS = 1024
"""Rows from which the spread of the queries within blocks is estimated."""
_MOST_GROWTH = 3.0
"""Bound of half the variance: a second-order estimate means nothing far away."""
_AT_ONCE = 1 << 19
"""Logits of block means formed at a time: what fits a processor's cache, and bounds the memory."""


class Groups(NamedTuple):
    """Queries in blocks.

    Attributes:
        order: [X, blocks rows] numbers of queries, each block consecutive.
        directions: `query_features`, `features` [X, d, m] and `value_features` [X, dv, m], in which distances between
            queries, keys and values are measured; squared distances of keys are variances of logits' differences
            within blocks.
        middle: [X, blocks, d] mean queries.
        share: [X, blocks] spread of a block, relative to the mean over blocks.
        empty: [X, blocks] blocks without a query that counts; None where all queries count.
    """

    order: Tensor
    directions: State
    middle: Tensor
    share: Tensor
    empty: Tensor | None


class Leaves(NamedTuple):
    """Keys in the order of their leaves.

    Attributes:
        table: [X, leaves, c, d + dv] keys and values side by side.
        hidden: [X, leaves, c, 1] places that hold no key; None if all do.
        away: [X, leaves, c, 1] squared length of a key in the directions of the keys.
        directions: [X or 1, d, m] those directions, with the scale of the logits: half the variance of a leaf's logits
            over a block is half its spread in them, times the share of the block.
    """

    table: Tensor
    hidden: Tensor | None
    away: Tensor
    directions: Tensor


@torch.no_grad()
def group(
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    real: Tensor | None,
    splits: tuple[int, int],
    state: State | None = None,
) -> Groups:
    """Sort queries by how differently keys act on them.

    Args:
        rows: [X, R, d] queries.
        k: [X, n, d]
        v: [X, n, dv]
        valid: [X, n] keys that count; None for all.
        real: [X, R] queries that count; None for all.
        splits: Levels of the tree of queries, and queries of a block.
        state: Fixed directions, by name; made from the inputs where they are not given.
    """
    sets, total, width = rows.shape
    fixed = {} if state is None else {name: x.to(k.device).repeat(sets // len(x), 1, 1) for name, x in state.items()}
    if "query_features" not in fixed:
        keys = rows_for_moments(k, valid)
        # what all keys share moves all logits of a query alike, which softmax does not see
        fixed["query_features"] = key_features(rows, real, keys - keys.mean(1, keepdim=True))
    levels, size = splits
    order = leaf_order(rows.float() @ fixed["query_features"], real, levels, size)
    counts = present_in(order, total, real)
    members = ordered(rows, order).float().reshape(sets, -1, size, width)
    if counts is None:
        middle, empty = members.mean(2), None
        away = members - middle.unsqueeze(2)
    else:
        weight = counts.float().reshape(sets, -1, size, 1)
        many = weight.sum(2)
        middle, empty = (members * weight).sum(2) / many.clamp_min(1.0), (many == 0).squeeze(-1)
        away = (members - middle.unsqueeze(2)) * weight
    moved = away.square().sum((2, 3))
    share = moved / moved.mean(1, keepdim=True).clamp_min(1e-30)
    if "features" not in fixed:
        fixed["features"] = key_features(k, valid, pick(away.flatten(1, 2), counts, _SPREAD_ROWS), FEATURES)
    if "value_features" not in fixed:
        fixed["value_features"] = value_features(v, valid)
    return Groups(order, fixed, middle, share, empty)


def attend_in_blocks(
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    real: Tensor | None,
    scale: float,
    sizes: tuple[int, int, int],
    state: State | None,
) -> tuple[Tensor, Tensor]:
    """Attention of blocks of queries to their centroids, and to the keys of their nearest leaves.

    Args:
        rows: [X, R, d] queries.
        k: [X, n, d]
        v: [X, n, dv]
        valid: [X, n] keys that count; None for all.
        real: [X, R] queries that count; None for all.
        scale: Factor of the logits.
        sizes: Largest block, largest leaf, and the number of near leaves.
        state: Fixed directions; see `group`.

    Returns:
        out [X, R, dv] and lse [X, R].
    """
    sets, width = k.shape[0], k.shape[-1]
    near = sizes[2]
    made = group(rows, k, v, valid, real, levels_for(rows.shape[1], sizes[0]), state)
    blocks = made.middle.shape[1]
    q = ordered(rows, made.order).reshape(sets, blocks, -1, width)
    leaves = leaves_of(k, v, valid, made.directions, scale, sizes[1])
    middle = made.middle.to(leaves.table.dtype)
    outs, sums = [], []
    # a graph takes any number of sequences, so all blocks go at once
    step = blocks if torch.compiler.is_exporting() else max(1, _AT_ONCE // (sets * leaves.table[0, ..., 0].numel()))
    for first in range(0, blocks, step):
        some = slice(first, min(first + step, blocks))
        centre, bias, mass = centres(leaves, middle[:, some], made.share[:, some], scale)
        chosen = mass.mT.topk(min(near, mass.shape[1]), dim=-1, sorted=False).indices
        out, lse = near_and_far(q[:, some], leaves.table, leaves.hidden, centre.to(q.dtype), bias, chosen, scale)
        outs.append(out)
        sums.append(lse)
    return in_place(torch.cat(outs, 1), torch.cat(sums, 1), made.order, rows.shape[1])


def leaves_of(k: Tensor, v: Tensor, valid: Tensor | None, directions: State, scale: float, leaf: int) -> Leaves:
    """Sort keys into leaves by how differently they act within the blocks, and by their values.

    Args:
        k: [X, n, d]
        v: [X, n, dv]
        valid: [X, n] keys that count; None for all.
        directions: Those of the blocks.
        scale: Factor of the logits.
        leaf: Largest leaf.
    """
    sets, n, _ = k.shape
    levels, size = levels_for(n, leaf)
    kind = torch.float64 if k.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        own = directions["features"] * scale
        y, z = k.float() @ own, v.float() @ directions["value_features"]
        order = key_order(y, z, valid, levels, size)
        away = y.square().sum(-1, keepdim=True)
    table = ordered(torch.cat([k.to(kind), v.to(kind)], -1), order).reshape(sets, -1, size, k.shape[-1] + v.shape[-1])
    present = present_in(order, n, valid)
    hidden = None if present is None else ~present.reshape(sets, -1, size, 1)
    return Leaves(table, hidden, ordered(away, order).reshape(sets, -1, size, 1).to(kind), own.to(kind))


def centres(leaves: Leaves, middle: Tensor, share: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Centroids of all leaves for blocks with these mean queries; weights and biases are constant in the gradient.

    Args:
        leaves: The keys.
        middle: [X, b, d] mean queries.
        share: [X, b] relative spread of the blocks.
        scale: Factor of the logits.

    Returns:
        centroids k_c and v_c side by side [X, b, leaves, d + dv], bias [X, b, leaves], and the logs of the leaves'
        shares of the denominator at the mean queries, up to what all leaves of a block have in common [X, leaves, b].
    """
    sets, count, size, _ = leaves.table.shape
    width = middle.shape[-1]
    middle = middle * scale
    with torch.no_grad():
        keys = leaves.table[..., :width].detach().reshape(sets, count * size, width)
        logits = (keys @ middle.mT).reshape(sets, count, size, -1)
        if leaves.hidden is not None:
            logits.masked_fill_(leaves.hidden, _HIDDEN)
        top = logits.amax(2, keepdim=True)
        weight = logits.sub_(top if leaves.hidden is None else top.masked_fill(top == _HIDDEN, 0.0)).exp_()
        total = weight.sum(2, keepdim=True)
        weight.div_(total if leaves.hidden is None else total.clamp_min(1e-30))
        mass = (top + torch.log(total)).squeeze(2)
    found = weight.mT @ leaves.table
    with torch.no_grad():
        own = found[..., :width].detach()
        y = (own.reshape(sets, -1, width) @ leaves.directions).square().sum(-1).reshape(own.shape[:3])
        second = (weight * leaves.away).sum(2)
        grown = (second - y).mul_(0.5 * share.unsqueeze(1)).clamp_(0.0, _MOST_GROWTH)
        mass = mass + grown
        bias = mass - (own * middle.unsqueeze(1)).sum(-1)
    return found.transpose(1, 2), bias.mT.contiguous(), mass


def near_and_far(
    q: Tensor, table: Tensor, gaps: Tensor | None, centre: Tensor, bias: Tensor, chosen: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Exact attention of each block to the keys of its chosen leaves, merged with the centroids of the others.

    Args:
        q: [X, b, rows, d]
        table: [X, leaves, c, d + dv] keys and values.
        gaps: [X, leaves, c, 1] places that hold no key; None if all do.
        centre: [X, b, leaves, d + dv] centroids of keys and values.
        bias: [X, b, leaves]
        chosen: [X, b, near] numbers of leaves.
        scale: Factor of the logits.

    Returns:
        out [X, b, rows, dv] and lse [X, b, rows].
    """
    near, width = chosen.shape[2], q.shape[-1]
    if near:
        bias = bias.scatter(2, chosen, _HIDDEN)
    parts = [Part(centre[..., :width], centre[..., width:], bias.unsqueeze(2))]
    if near:
        keys, hidden = opened(table, gaps, chosen)
        keys = keys.to(q.dtype)
        parts.append(Part(keys[..., :width], keys[..., width:], None if hidden is None else hidden.unsqueeze(2)))
    return merged(q, parts, scale)


def opened(table: Tensor, gaps: Tensor | None, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
    """Keys and values of chosen leaves [X, b, near], and what hides places that hold none.

    Args:
        table: [X, leaves, c, d + dv]
        gaps: [X, leaves, c, 1] places that hold no key; None if all do.
        chosen: [X, b, near] numbers of leaves.

    Returns:
        [X, b, near c, d + dv], and a bias [X, b, near c] or None.
    """
    flat = chosen.flatten(1)
    found = rows_at(table.flatten(2), flat).reshape(*chosen.shape[:2], -1, table.shape[-1])
    if gaps is None:
        return found, None
    return found, hiding(rows_at(gaps.flatten(2), flat).reshape(found.shape[:3]))


def in_place(out: Tensor, lse: Tensor, order: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Outputs [X, b, rows, dv] and sums [X, b, rows] of queries in an order, back at the queries' places."""
    places = torch.arange(order.shape[1], device=out.device).expand_as(order)
    back = torch.zeros_like(order).scatter(1, order, places)[:, :total]  # where each query stands
    return rows_at(out.flatten(1, 2), back), lse.flatten(1, 2).gather(1, back)
