"""Clustered attention: near keys exactly, far keys by weighted centroids of a balanced tree.

Keys are sorted into leaves by a tree in the metric in which the queries tell them apart. A leaf stands
for its keys by one weighted centroid (k_c, v_c) and a bias, both from the exact softmax rows of a few
pilot queries: w_j ~ mean_i P_ij and bias_c = log(mean_i sum_{j in c} P_ij / mean_i exp(s q_i.k_c) / Z_i).
Blocks of similar queries attend exactly to the keys of their `near` most relevant leaves; the two parts
are merged by their log-sum-exps. A space-partition-tree form of the kernel density estimate of KDEformer.
Causal: chunks attend exactly to themselves and to the centroids of earlier chunks, which only earlier
positions shape.
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from kdtool.attention import exact
from kdtool.attention._base import Call, State, counted, repeat_heads
from kdtool.attention._flash import Part, merged
from kdtool.attention._tree import leaf_order, levels_for, rows_at

paper: str = "after Zandieh et al., KDEformer, ICML 2023, arXiv 2302.02451; own formulation"
causal: bool = True

_HIDDEN = float("-inf")
_FEATURES = 12
"""Directions in which distances between keys are measured."""
_MOMENT_ROWS = 512
"""Rows from which second moments are estimated."""
_FLOOR = 1e-30
"""Probability below which a pilot says nothing of a leaf."""


@dataclass(frozen=True, slots=True)
class Config:
    """How finely keys are grouped, and how many are attended to exactly."""

    leaf: Annotated[int, Field(ge=1)] = 32
    """Largest number of keys that share a centroid."""
    near: Annotated[int, Field(ge=0)] = 0
    """Leaves whose keys a block of queries attends to exactly; 0 for centroids only. Not used when causal."""
    block: Annotated[int, Field(ge=1)] = 64
    """Largest number of queries that share their near leaves."""
    pilots: Annotated[int, Field(ge=1)] = 64
    """Queries whose exact softmax rows weight the keys."""
    chunk: Annotated[int, Field(ge=16)] = 1024
    """Length of the exact causal chunks."""
    min_length: Annotated[int, Field(ge=0)] = 2048
    """Fewer keys than this are attended to exactly."""


class Summary(NamedTuple):
    """Leaves of one set of keys.

    Attributes:
        order: [X, leaves size] numbers of keys, n and above for none; each leaf is consecutive.
        k: [X, leaves, d] centroids.
        v: [X, leaves, dv] centroids of the values.
        bias: [X, leaves] log of the weight of a leaf, -inf for an empty one.
    """

    order: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, call: Call, config: Config | None = None, state: State | None = None
) -> tuple[Tensor, Tensor]:
    """Approximate attention; exact below `min_length` keys, with windows and with biases.

    Args:
        q: [B, Hq, nq, d]
        k: [B, Hkv, n, d]
        v: [B, Hkv, n, dv]
        call: Scale and masks; nothing is drawn, so the seed does not matter.
        config: Settings.
        state: `features` [Hkv, d, m], fixed directions for the key tree; made from each input without.

    Returns:
        out [B, Hq, nq, dv] and lse [B, Hq, nq], the log of the estimated denominator.
    """
    config = config or Config()
    n, nq = k.shape[2], q.shape[2]
    plain = call.window is None and call.bias is None and n >= max(config.min_length, 2)
    if call.causal:
        if not plain or nq != n or n <= config.chunk:
            return exact.attend(q, k, v, call)
        return _causal(q, k, v, call, config)
    if not plain:
        return exact.attend(q, k, v, call)
    batch, heads, kv = q.shape[0], q.shape[1], k.shape[1]
    rows = q.reshape(batch * kv, heads // kv * nq, q.shape[-1])
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    valid, real = counted(call, kv, heads // kv, nq, n)
    features = None if state is None else state["features"].to(k.device).repeat(batch, 1, 1)
    pilots = pick(rows, real, config.pilots)
    found = summarise(keys, values, valid, rows_for_moments(rows, real), pilots, call.scale, config.leaf, features)
    if config.near == 0:
        layout = rows.unsqueeze(1)
        out, lse = merged(layout, [Part(found.k[:, None], found.v[:, None], found.bias[:, None, None])], call.scale)
        out, lse = out[:, 0], lse[:, 0]
    else:
        out, lse = _near_and_far(rows, keys, values, valid, real, found, call.scale, config)
    return out.reshape(batch, heads, nq, -1), lse.reshape(batch, heads, nq)


def pick(rows: Tensor, valid: Tensor | None, count: int) -> Tensor:
    """`count` rows spread evenly over the valid ones, [X, count, d]; all of them if there are no more."""
    total = rows.shape[1]
    count = min(count, total)
    place = (torch.arange(count, device=rows.device) * 2 + 1) * total // (2 * count)
    if valid is None:
        return rows[:, place]
    position = torch.arange(total, device=rows.device)
    first = torch.sort((~valid).long() * total + position, dim=1).values % total  # the valid ones in front
    many = valid.sum(1, keepdim=True).clamp_min(1)
    place = (torch.arange(count, device=rows.device) * 2 + 1) * many // (2 * count)
    return rows_at(rows, first.gather(1, place))


def rows_for_moments(rows: Tensor, valid: Tensor | None) -> Tensor:
    """The rows that second moments are estimated from, [X, up to 512, d]."""
    return rows if valid is None and rows.shape[1] <= _MOMENT_ROWS else pick(rows, valid, _MOMENT_ROWS)


@torch.no_grad()
def key_features(k: Tensor, valid: Tensor | None, queries: Tensor, count: int = _FEATURES) -> Tensor:
    """Directions of the key space in which keys act differently on these queries.

    With M = L L^T the second moment of the queries, |L^T (k - k')|^2 is the mean squared difference of
    two keys' logits; U spans the largest variances of k L.

    Args:
        k: [X, n, d]
        valid: [X, n] keys that count; None for all.
        queries: [X, rows, d]
        count: Number of directions.

    Returns:
        [X, d, min(count, d)]: features of keys are k @ this.
    """
    queries = queries.float()
    width = k.shape[-1]
    moment = queries.mT @ queries / queries.shape[1]
    size = torch.diagonal(moment, dim1=1, dim2=2).mean(-1)[:, None, None]
    eye = torch.eye(width, device=k.device)
    lower = torch.linalg.cholesky(moment + (1e-4 * size + 1e-12) * eye)
    seen = rows_for_moments(k, valid).float()
    centred = (seen - seen.mean(1, keepdim=True)) @ lower
    _, vectors = torch.linalg.eigh(centred.mT @ centred / seen.shape[1])
    features: Tensor = lower @ vectors[..., -count:]
    return features


def summarise(
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    queries: Tensor,
    pilots: Tensor,
    scale: float,
    leaf: int,
    features: Tensor | None = None,
) -> Summary:
    """Group keys into leaves, and stand for each leaf by a weighted centroid.

    Args:
        k: [X, n, d]
        v: [X, n, dv]
        valid: [X, n] keys that count; None for all.
        queries: [X, rows, d] for the metric.
        pilots: [X, rows, d] whose exact softmax rows weight the keys.
        scale: Factor of the logits.
        leaf: Largest leaf.
        features: [X, d, m] directions for the tree; from keys and queries by default.
    """
    n = k.shape[1]
    levels, size = levels_for(n, leaf)
    with torch.no_grad():
        if features is None:
            features = key_features(k, valid, queries)
        order = leaf_order(k.float() @ features, valid, levels, size)
        present = _present(order, n, valid)
    own_k, own_v = _ordered(k, order, n), _ordered(v, order, n)
    with torch.no_grad():
        logits = pilots.float() @ own_k.detach().float().mT * scale
        if present is not None:
            logits = logits.masked_fill(~present.unsqueeze(1), _HIDDEN)
        top = logits.amax(-1, keepdim=True)
        p = torch.exp(logits - top.masked_fill(top == _HIDDEN, 0.0))
        total = p.sum(-1, keepdim=True).clamp_min(_FLOOR)
        mean = ((1.0 / total).mT @ p).squeeze(1) / pilots.shape[1]  # [X, places]
        weight = mean + 1e-3 / n
        if present is not None:
            weight = weight * present
        weight = weight.unflatten(1, (-1, size))  # type: ignore[no-untyped-call]
        mass = mean.unflatten(1, (-1, size)).sum(-1)  # type: ignore[no-untyped-call]
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(_FLOOR)
    centre_k, centre_v = _centroids(own_k, weight), _centroids(own_v, weight)
    with torch.no_grad():
        far = torch.exp(pilots.float() @ centre_k.detach().float().mT * scale - top.masked_fill(top == _HIDDEN, 0.0))
        stands = ((1.0 / total).mT @ far).squeeze(1) / pilots.shape[1]
        count = float(size) if present is None else present.unflatten(1, (-1, size)).sum(-1).float()  # type: ignore[no-untyped-call]
        count = torch.as_tensor(count, device=k.device).expand_as(mass)
        known = (mass > _FLOOR) & (stands > _FLOOR)
        bias = torch.where(known, torch.log(mass.clamp_min(_FLOOR) / stands.clamp_min(_FLOOR)), torch.log(count))
        bias = bias.masked_fill(count == 0, _HIDDEN)
    return Summary(order, centre_k, centre_v, bias)


def summaries(k: Tensor, v: Tensor, perm: Tensor, w: Tensor, leaf: int) -> tuple[Tensor, Tensor]:
    """Centroids of leaves given by an order and weights.

    Args:
        k: [X, n, d]
        v: [X, n, dv]
        perm: [X, n] order of the keys, `leaf` consecutive ones form a leaf.
        w: [X, n] weights in that order, of sum 1 in each leaf.
        leaf: Size of a leaf.

    Returns:
        [X, n / leaf, d] and [X, n / leaf, dv].
    """
    n = k.shape[1]
    weight = w.unflatten(1, (-1, leaf))  # type: ignore[no-untyped-call]
    return _centroids(_ordered(k, perm, n), weight), _centroids(_ordered(v, perm, n), weight)


def _centroids(ordered: Tensor, weight: Tensor) -> Tensor:
    """Weighted means of consecutive rows: [X, L c, d] with weights [X, L, c] to [X, L, d]."""
    leaves, size = weight.shape[1:]
    rows = ordered.reshape(-1, size, ordered.shape[-1])
    found = weight.to(ordered.dtype).reshape(-1, 1, size) @ rows
    return found.reshape(ordered.shape[0], leaves, -1)


def _present(order: Tensor, n: int, valid: Tensor | None) -> Tensor | None:
    """Which places of an order hold a key that counts; None if all do."""
    if valid is None:
        return None if order.shape[1] == n else order < n
    inside = order < n
    return inside & valid.gather(1, order.clamp_max(n - 1))


def _ordered(x: Tensor, order: Tensor, n: int) -> Tensor:
    """Rows of x [X, n, d] in an order [X, places]; places without a row repeat the last one."""
    places = order if order.shape[1] == n else order.clamp_max(n - 1)
    return rows_at(x, places)


def _near_and_far(
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    real: Tensor | None,
    found: Summary,
    scale: float,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """Sort queries into blocks, choose each block's near leaves, and attend; rows that are padding choose nothing."""
    sets, total, _ = rows.shape
    leaves = found.k.shape[1]
    levels, size = levels_for(total, config.block)
    with torch.no_grad():
        keys = rows_for_moments(k, valid)
        # what all keys share moves all logits of a query alike, which softmax does not see
        features = key_features(rows, real, keys - keys.mean(1, keepdim=True))
        order = leaf_order(rows.float() @ features, real, levels, size)
        counts = _present(order, total, real)
        blocks = 1 << levels
        members = _ordered(rows, order, total).float()
        if counts is None:
            middle = members.reshape(sets, blocks, size, -1).mean(2)
        else:
            weight = counts.float().reshape(sets, blocks, size, 1)
            members = members.reshape(sets, blocks, size, -1) * weight
            middle = members.sum(2) / weight.sum(2).clamp_min(1.0)
        score = middle @ found.k.float().mT * scale + found.bias.unsqueeze(1)
        chosen = torch.topk(score, min(config.near, leaves), dim=-1, sorted=False).indices  # [X, blocks, near]
    return _attend_blocks(rows, k, v, valid, found, order, chosen, scale)


def _attend_blocks(
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    found: Summary,
    order: Tensor,
    chosen: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Exact attention of each query block to its chosen leaves, merged with the centroids of the others."""
    sets, total, width = rows.shape
    n, leaves, blocks = k.shape[1], found.k.shape[1], chosen.shape[1]
    q = _ordered(rows, order, total).reshape(sets, blocks, -1, width)
    members = found.order.reshape(sets, leaves, -1)
    picked = members.gather(1, chosen.reshape(sets, -1, 1).expand(-1, -1, members.shape[-1]))
    near = picked.reshape(sets, -1)  # numbers of the near keys, block after block
    present = _present(near, n, valid) if near.numel() else None
    if valid is None and found.order.shape[1] == n:
        present = None
    hidden = None
    if present is not None:
        hidden = torch.zeros(near.shape, device=q.device).masked_fill_(~present, _HIDDEN)
        hidden = hidden.reshape(sets, blocks, 1, -1)
    near_k = rows_at(k, near.clamp_max(n - 1)).reshape(sets, blocks, -1, width)
    near_v = rows_at(v, near.clamp_max(n - 1)).reshape(sets, blocks, -1, v.shape[-1])
    far_bias = found.bias[:, None].expand(-1, blocks, -1).scatter(2, chosen, _HIDDEN).unsqueeze(2)
    parts = [
        Part(near_k, near_v, hidden),
        Part(
            found.k[:, None].expand(-1, blocks, -1, -1),
            found.v[:, None].expand(-1, blocks, -1, -1),
            far_bias,
        ),
    ]
    out, lse = merged(q, parts, scale)
    places = torch.arange(order.shape[1], device=q.device).expand(sets, -1)
    back = torch.zeros_like(order).scatter(1, order, places)[:, :total]  # where each query stands
    out = rows_at(out.flatten(1, 2), back)
    return out, lse.flatten(1, 2).gather(1, back)


def centroid_attention(
    q: Tensor, k: Tensor, v: Tensor, perm: Tensor, w: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to centroids of given leaves.

    Args:
        q: [B, H, nq, d]
        k: [B, H, n, d]
        v: [B, H, n, dv]
        perm: [B, H, n] order of the keys.
        w: [B, H, n] weights in that order.
        bias: [B, H, leaves] log weights of the leaves.
        scale: Factor of the logits.

    Returns:
        out [B, H, nq, dv], lse [B, H, nq].
    """
    batch, heads = q.shape[:2]
    leaf = k.shape[2] // bias.shape[-1]
    centre_k, centre_v = summaries(k.flatten(0, 1), v.flatten(0, 1), perm.flatten(0, 1), w.flatten(0, 1), leaf)
    part = Part(
        centre_k.reshape(batch, heads, *centre_k.shape[1:]),
        centre_v.reshape(batch, heads, *centre_v.shape[1:]),
        bias.unsqueeze(2),
    )
    return merged(q, [part], scale)


def near_far_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    perm: Tensor,
    w: Tensor,
    bias: Tensor,
    query_order: Tensor,
    sel: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Exact attention to selected leaves merged with centroids of the others.

    Args:
        q: [B, H, nq, d]
        k: [B, H, n, d]
        v: [B, H, n, dv]
        perm: [B, H, n] order of the keys.
        w: [B, H, n] weights in that order.
        bias: [B, H, leaves] log weights of the leaves.
        query_order: [B, H, nq] order of the queries; blocks are consecutive.
        sel: [B, H, blocks, near] numbers of the near leaves.
        scale: Factor of the logits.

    Returns:
        out [B, H, nq, dv] in the order of q, lse [B, H, nq].
    """
    batch, heads = q.shape[:2]
    leaf = k.shape[2] // bias.shape[-1]
    rows, keys, values = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    order = perm.flatten(0, 1)
    centre_k, centre_v = summaries(keys, values, order, w.flatten(0, 1), leaf)
    found = Summary(order, centre_k, centre_v, bias.flatten(0, 1))
    out, lse = _attend_blocks(rows, keys, values, None, found, query_order.flatten(0, 1), sel.flatten(0, 1), scale)
    return out.reshape(batch, heads, *out.shape[1:]), lse.reshape(batch, heads, -1)


def _causal(q: Tensor, k: Tensor, v: Tensor, call: Call, config: Config) -> tuple[Tensor, Tensor]:
    """Exact within chunks, centroids of earlier chunks beyond.

    Metric and pilots of a chunk's leaves are its own queries, which come before every query that reads them.
    """
    batch, heads, n, width = q.shape
    kv, size = k.shape[1], config.chunk
    whole = (n - 1) // size  # chunks that a later one reads
    groups = heads // kv
    past = slice(0, whole * size)
    keys = k[:, :, past].reshape(batch * kv * whole, size, width)
    values = v[:, :, past].reshape(batch * kv * whole, size, -1)
    rows = q[:, :, past].reshape(batch, kv, groups, whole, size, width).transpose(2, 3).reshape(len(keys), -1, width)
    valid = real = None
    if call.key_mask is not None:
        valid = call.key_mask[:, None, past].expand(-1, kv, -1).reshape(len(keys), size)
        real = valid.repeat(1, groups)
    found = summarise(
        keys, values, valid, rows_for_moments(rows, real), pick(rows, real, config.pilots), call.scale, config.leaf
    )
    leaves = found.k.shape[1]
    far_k = repeat_heads(found.k.reshape(batch, kv, whole * leaves, width), heads)
    far_v = repeat_heads(found.v.reshape(batch, kv, whole * leaves, -1), heads)
    far_bias = repeat_heads(found.bias.reshape(batch, kv, whole * leaves, 1), heads).mT
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    outs, sums = [], []
    for chunk in range(whole + 1):
        own = slice(chunk * size, min((chunk + 1) * size, n))
        mask = (
            None
            if call.key_mask is None
            else exact.hidden_bias(Call(call.scale, call.key_mask[:, own]), 1, size, q.device)
        )
        parts = [Part(k[:, :, own], v[:, :, own], mask, True)]
        if chunk:
            seen = slice(0, chunk * leaves)
            parts.append(Part(far_k[:, :, seen], far_v[:, :, seen], far_bias[..., seen]))
        out, lse = merged(q[:, :, own], parts, call.scale)
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs, 2), torch.cat(sums, 2)
