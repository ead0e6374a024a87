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
from kdtool.attention._flash import Part, merged
from kdtool.attention._leaves import key_features, key_order, ordered, pick, present_in, rows_for_moments, value_features
from kdtool.attention._tree import leaf_order, levels_for, rows_at

_HIDDEN = float("-inf")
_SPREAD_ROWS = 1024
"""Rows from which the spread of the queries within blocks is estimated."""
_MOST_GROWTH = 1.5
"""Bound of the variance term, which is a second-order estimate and means nothing far away."""
_AT_ONCE = 1 << 20
"""Logits of block means formed at a time: what fits a processor's cache, and bounds the memory."""


class Layout(NamedTuple):
    """Queries in blocks and keys in leaves.

    Attributes:
        query_order: [X, blocks rows] numbers of queries, each block consecutive.
        key_order: [X, leaves c] numbers of keys, each leaf consecutive.
        middle: [X, blocks, d] mean queries.
        spread: [X, d, d] second moment of what queries differ by from their block's mean.
        share: [X, blocks] spread of a block, relative to the mean over blocks.
    """

    query_order: Tensor
    key_order: Tensor
    middle: Tensor
    spread: Tensor
    share: Tensor


@torch.no_grad()
def lay_out(
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    real: Tensor | None,
    block: int,
    leaf: int,
    state: State | None,
) -> Layout:
    """Sort queries by how differently keys act on them, and keys by how differently they act within the blocks.

    Args:
        rows: [X, R, d] queries.
        k: [X, n, d]
        v: [X, n, dv]
        valid: [X, n] keys that count; None for all.
        real: [X, R] queries that count; None for all.
        block: Largest number of queries in a block.
        leaf: Largest number of keys in a leaf.
        state: Fixed directions, by name; made from the inputs where they are not given.
    """
    sets, total, width = rows.shape
    fixed = {} if state is None else {name: x.to(k.device).repeat(sets // len(x), 1, 1) for name, x in state.items()}
    if "query_features" not in fixed:
        keys = rows_for_moments(k, valid)
        # what all keys share moves all logits of a query alike, which softmax does not see
        fixed["query_features"] = key_features(rows, real, keys - keys.mean(1, keepdim=True))
    levels, size = levels_for(total, block)
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
    some = pick(away.flatten(1, 2), counts, _SPREAD_ROWS)
    if "features" not in fixed:
        fixed["features"] = key_features(k, valid, some)
    if "value_features" not in fixed:
        fixed["value_features"] = value_features(v, valid)
    levels, size = levels_for(k.shape[1], leaf)
    own = key_order(k, v, valid, fixed["features"], fixed["value_features"], levels, size)
    return Layout(query_order, own, middle, some.mT @ some / some.shape[1], share)


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
    block, leaf, near = sizes
    sets, n, width = k.shape
    made = lay_out(rows, k, v, valid, real, block, leaf, state)
    blocks = made.middle.shape[1]
    present = present_in(made.key_order, n, valid)
    kind = torch.float64 if rows.dtype == torch.float64 else torch.float32
    q = ordered(rows, made.query_order).reshape(sets, blocks, -1, width)
    size = levels_for(n, leaf)[1]
    keys = ordered(k, made.key_order).to(kind).reshape(sets, -1, size, width)
    values = ordered(v, made.key_order).to(kind).reshape(sets, -1, size, v.shape[-1])
    hidden = None if present is None else ~present.reshape(sets, -1, size, 1)
    leaves = Leaves(keys, values, hidden, made.spread.to(kind) * scale**2)
    outs, sums = [], []
    step = max(1, _AT_ONCE // (sets * made.key_order.shape[1]))
    for first in range(0, blocks, step):
        some = slice(first, min(first + step, blocks))
        far_k, far_v, bias, mass = centres(leaves, made.middle[:, some].to(kind), made.share[:, some], scale)
        chosen = mass.topk(min(near, mass.shape[2]), dim=-1, sorted=False).indices
        far = Part(far_k.to(q.dtype), far_v.to(q.dtype), bias.unsqueeze(2))
        out, lse = near_and_far(q[:, some], leaves, far, chosen, scale)
        outs.append(out)
        sums.append(lse)
    return in_place(torch.cat(outs, 1), torch.cat(sums, 1), made.query_order, rows.shape[1])


class Leaves(NamedTuple):
    """Keys in the order of their leaves.

    Attributes:
        k: [X, leaves, c, d]
        v: [X, leaves, c, dv]
        hidden: [X, leaves, c, 1] places that hold no key; None if all do.
        spread: [X, d, d] second moment of the scaled queries within blocks.
    """

    k: Tensor
    v: Tensor
    hidden: Tensor | None
    spread: Tensor


def centres(leaves: Leaves, middle: Tensor, share: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centroids of all leaves for blocks with these mean queries; weights and biases are constant in the gradient.

    Args:
        leaves: The keys.
        middle: [X, b, d] mean queries.
        share: [X, b] relative spread of the blocks.
        scale: Factor of the logits.

    Returns:
        k_c [X, b, leaves, d], v_c [X, b, leaves, dv], bias [X, b, leaves] and the logs of the leaves' shares of the
        denominator at the mean queries, up to what all leaves of a block have in common [X, b, leaves].
    """
    with torch.no_grad():
        k = leaves.k.detach()
        logits = k @ (middle * scale).mT.unsqueeze(1)  # [X, leaves, c, b]
        if leaves.hidden is not None:
            logits = logits.masked_fill(leaves.hidden, _HIDDEN)
        top = logits.amax(2, keepdim=True)
        weight = torch.exp(logits - (top if leaves.hidden is None else top.masked_fill(top == _HIDDEN, 0.0)))
        total = weight.sum(2, keepdim=True)
        weight = weight / (total if leaves.hidden is None else total.clamp_min(1e-30))
        mass = (top + torch.log(total)).squeeze(2)  # [X, leaves, b]
        moved = k @ leaves.spread.unsqueeze(1)
        second = weight.mT @ (moved * k).sum(-1, keepdim=True)  # [X, leaves, b, 1]
    far_k, far_v = weight.mT @ leaves.k, weight.mT @ leaves.v  # [X, leaves, b, .]
    with torch.no_grad():
        centre = far_k.detach()
        grown = second.squeeze(-1) - ((centre @ leaves.spread.unsqueeze(1)) * centre).sum(-1)
        grown = (0.5 * grown * share.unsqueeze(1)).clamp(0.0, _MOST_GROWTH)
        bias = mass - scale * (centre * middle.unsqueeze(1)).sum(-1) + grown
    return far_k.transpose(1, 2), far_v.transpose(1, 2), bias.mT, mass.mT


def near_and_far(q: Tensor, leaves: Leaves, far: Part, chosen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Exact attention of each block to the keys of its chosen leaves, merged with the centroids of the others.

    Args:
        q: [X, b, rows, d]
        leaves: The keys.
        far: Centroids [X, b, leaves, .] with their bias [X, b, 1, leaves].
        chosen: [X, b, near] numbers of leaves.
        scale: Factor of the logits.

    Returns:
        out [X, b, rows, dv] and lse [X, b, rows].
    """
    sets, blocks, near = chosen.shape
    if near == 0:
        return merged(q, [far], scale)
    size = leaves.k.shape[2]
    assert far.bias is not None
    bias = far.bias.squeeze(2).scatter(2, chosen, _HIDDEN).unsqueeze(2)
    flat = chosen.reshape(sets, -1)
    near_k, near_v = (
        rows_at(x.flatten(2), flat).reshape(sets, blocks, near * size, x.shape[-1]).to(q.dtype)
        for x in (leaves.k, leaves.v)
    )
    hidden = None
    if leaves.hidden is not None:
        gone = rows_at(leaves.hidden.flatten(2), flat).reshape(sets, blocks, 1, near * size)
        hidden = torch.zeros(gone.shape, device=q.device).masked_fill_(gone, _HIDDEN)
    return merged(q, [Part(near_k, near_v, hidden), Part(far.k, far.v, bias)], scale)


def in_place(out: Tensor, lse: Tensor, order: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Outputs [X, b, rows, dv] and sums [X, b, rows] of queries in an order, back at the queries' places."""
    places = torch.arange(order.shape[1], device=out.device).expand_as(order)
    back = torch.zeros_like(order).scatter(1, order, places)[:, :total]  # where each query stands
    return rows_at(out.flatten(1, 2), back), lse.flatten(1, 2).gather(1, back)
