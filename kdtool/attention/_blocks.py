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
_MULTIPLE = 16
"""Products of small matrices are quicker where their width is a multiple of the processor's vectors."""


class Layout(NamedTuple):
    """Queries in blocks and keys in leaves.

    Attributes:
        query_order: [X, blocks rows] numbers of queries, each block consecutive.
        key_order: [X, leaves c] numbers of keys, each leaf consecutive.
        y: [X, n, m] features of the keys: squared distances are variances of logits' differences within blocks.
        directions: `query_features`, `features` [X, d, m] and `value_features` [X, dv, m], in which distances between
            queries, keys and values are measured.
        middle: [X, blocks, d] mean queries.
        share: [X, blocks] spread of a block, relative to the mean over blocks.
    """

    query_order: Tensor
    key_order: Tensor
    y: Tensor
    directions: State
    middle: Tensor
    share: Tensor


class Leaves(NamedTuple):
    """Keys in the order of their leaves.

    Attributes:
        table: [X, leaves, c, d + dv + more] keys, values, and what else is averaged with them.
        hidden: [X, leaves, c, 1] places that hold no key; None if all do.
        parts: Widths of keys, values and features y; |y|^2 comes next.
    """

    table: Tensor
    hidden: Tensor | None
    parts: tuple[int, int, int]


@torch.no_grad()
def lay_out(
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    real: Tensor | None,
    scale: float,
    sizes: tuple[int, int, int],
    state: State | None,
) -> Layout:
    """Sort queries by how differently keys act on them, and keys by how differently they act within the blocks.

    Args:
        rows: [X, R, d] queries.
        k: [X, n, d]
        v: [X, n, dv]
        valid: [X, n] keys that count; None for all.
        real: [X, R] queries that count; None for all.
        scale: Factor of the logits.
        sizes: Largest block and largest leaf first.
        state: Fixed directions, by name; made from the inputs where they are not given.
    """
    sets, total, width = rows.shape
    fixed = {} if state is None else {name: x.to(k.device).repeat(sets // len(x), 1, 1) for name, x in state.items()}
    if "query_features" not in fixed:
        keys = rows_for_moments(k, valid)
        # what all keys share moves all logits of a query alike, which softmax does not see
        fixed["query_features"] = key_features(rows, real, keys - keys.mean(1, keepdim=True))
    levels, size = levels_for(total, sizes[0])
    query_order = leaf_order(rows.float() @ fixed["query_features"], real, levels, size)
    counts = present_in(query_order, total, real)
    members = ordered(rows, query_order).float().reshape(sets, -1, size, width)
    if counts is None:
        middle = members.mean(2)
        away = members - middle.unsqueeze(2)
    else:
        weight = counts.float().reshape(sets, -1, size, 1)
        middle = (members * weight).sum(2) / weight.sum(2).clamp_min(1.0)
        away = (members - middle.unsqueeze(2)) * weight
    moved = away.square().sum((2, 3))
    share = moved / moved.mean(1, keepdim=True).clamp_min(1e-30)
    if "features" not in fixed:
        fixed["features"] = key_features(k, valid, pick(away.flatten(1, 2), counts, _SPREAD_ROWS), FEATURES)
    if "value_features" not in fixed:
        fixed["value_features"] = value_features(v, valid)
    levels, size = levels_for(k.shape[1], sizes[1])
    y, z = k.float() @ (fixed["features"] * scale), v.float() @ fixed["value_features"]
    own = key_order(y, z, valid, levels, size)
    return Layout(query_order, own, y, fixed, middle, share)


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
        state: Fixed directions; see `lay_out`.

    Returns:
        out [X, R, dv] and lse [X, R].
    """
    sets, n, width = k.shape
    near = sizes[2]
    made = lay_out(rows, k, v, valid, real, scale, sizes, state)
    blocks = made.middle.shape[1]
    q = ordered(rows, made.query_order).reshape(sets, blocks, -1, width)
    kind = torch.float64 if rows.dtype == torch.float64 else torch.float32
    leaves = leaves_of(k.to(kind), v.to(kind), valid, made, levels_for(n, sizes[1])[1])
    middle = made.middle.to(kind)
    outs, sums = [], []
    # a graph takes any number of sequences, so all blocks go at once
    step = blocks if torch.compiler.is_exporting() else max(1, _AT_ONCE // (sets * made.key_order.shape[1]))
    for first in range(0, blocks, step):
        some = slice(first, min(first + step, blocks))
        centre, bias, mass = centres(leaves, middle[:, some], made.share[:, some], scale)
        chosen = mass.mT.topk(min(near, mass.shape[1]), dim=-1, sorted=False).indices
        out, lse = near_and_far(q[:, some], leaves, centre.to(q.dtype), bias, chosen, scale)
        outs.append(out)
        sums.append(lse)
    return in_place(torch.cat(outs, 1), torch.cat(sums, 1), made.query_order, rows.shape[1])


def leaves_of(k: Tensor, v: Tensor, valid: Tensor | None, made: Layout, size: int) -> Leaves:
    """Keys, values, features y and |y|^2 side by side, in the order of the leaves, filled up with zeros."""
    sets, n, _ = k.shape
    y = made.y.to(k.dtype)
    parts = [k, v, y, y.square().sum(-1, keepdim=True)]
    fill = -sum(part.shape[-1] for part in parts) % _MULTIPLE
    table = torch.cat([*parts, k.new_zeros((sets, n, fill))], -1)
    present = present_in(made.key_order, n, valid)
    hidden = None if present is None else ~present.reshape(sets, -1, size, 1)
    widths = (k.shape[-1], v.shape[-1], y.shape[-1])
    return Leaves(ordered(table, made.key_order).reshape(sets, -1, size, table.shape[-1]), hidden, widths)


def centres(leaves: Leaves, middle: Tensor, share: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Centroids of all leaves for blocks with these mean queries; weights and biases are constant in the gradient.

    Args:
        leaves: The keys, with features y and |y|^2.
        middle: [X, b, d] mean queries.
        share: [X, b] relative spread of the blocks.
        scale: Factor of the logits.

    Returns:
        centroids k_c, v_c and more [X, b, leaves, .], bias [X, b, leaves], and the logs of the leaves' shares of the
        denominator at the mean queries, up to what all leaves of a block have in common [X, leaves, b].
    """
    sets, count, size, _ = leaves.table.shape
    width, wide, features = leaves.parts
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
        y = found[..., width + wide : width + wide + features]
        second = found[..., width + wide + features]
        grown = (second - y.square().sum(-1)).mul_(0.5 * share.unsqueeze(1)).clamp_(0.0, _MOST_GROWTH)
        mass = mass + grown
        bias = mass - (found[..., :width] * middle.unsqueeze(1)).sum(-1)
    return found.transpose(1, 2), bias.mT.contiguous(), mass


def near_and_far(
    q: Tensor, leaves: Leaves, centre: Tensor, bias: Tensor, chosen: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Exact attention of each block to the keys of its chosen leaves, merged with the centroids of the others.

    Args:
        q: [X, b, rows, d]
        leaves: The keys.
        centre: [X, b, leaves, d + dv or more] centroids of keys and values.
        bias: [X, b, leaves]
        chosen: [X, b, near] numbers of leaves.
        scale: Factor of the logits.

    Returns:
        out [X, b, rows, dv] and lse [X, b, rows].
    """
    near = chosen.shape[2]
    width, wide, _ = leaves.parts
    values = slice(width, width + wide)
    if near:
        bias = bias.scatter(2, chosen, _HIDDEN)
    parts = [Part(centre[..., :width], centre[..., values], bias.unsqueeze(2))]
    if near:
        keys, hidden = opened(leaves, chosen)
        keys = keys.to(q.dtype)
        parts.append(Part(keys[..., :width], keys[..., values], None if hidden is None else hidden.unsqueeze(2)))
    return merged(q, parts, scale)


def opened(leaves: Leaves, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
    """All keys of chosen leaves [X, b, near]: [X, b, near c, .], and what hides places that hold none."""
    flat = chosen.flatten(1)
    table = rows_at(leaves.table.flatten(2), flat).reshape(*chosen.shape[:2], -1, leaves.table.shape[-1])
    if leaves.hidden is None:
        return table, None
    return table, hiding(rows_at(leaves.hidden.flatten(2), flat).reshape(table.shape[:3]))


def in_place(out: Tensor, lse: Tensor, order: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Outputs [X, b, rows, dv] and sums [X, b, rows] of queries in an order, back at the queries' places."""
    places = torch.arange(order.shape[1], device=out.device).expand_as(order)
    back = torch.zeros_like(order).scatter(1, order, places)[:, :total]  # where each query stands
    return rows_at(out.flatten(1, 2), back), lse.flatten(1, 2).gather(1, back)
