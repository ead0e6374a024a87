"""Clustered attention: near keys exactly, far keys by weighted centroids of a balanced tree.

Queries are sorted into blocks and keys into leaves by trees, in the metrics in which each tells the other apart; keys
of a leaf also have like values. A block attends to one centroid (k_c, v_c) with a bias for each leaf, made for its
mean query, and exactly to the keys of its `near` most relevant leaves; the two parts are merged by their
log-sum-exps. A space-partition-tree form of the kernel density estimate of KDEformer. Causal: chunks attend exactly
to themselves and to centroids of what comes before them, made for the mean query of a group of earlier queries that is
next to their own, so that only earlier positions shape them.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kdtool.attention import exact
from kdtool.attention._base import Call, State, counted, short
from kdtool.attention._blocks import attend_in_blocks, in_place, near_and_far
from kdtool.attention._causal import attend_causal
from kdtool.attention._flash import Part, merged
from kdtool.attention._leaves import centroids, ordered

paper: str = "after Zandieh et al., KDEformer, ICML 2023, arXiv 2302.02451; own formulation"
causal: bool = True


@dataclass(frozen=True, slots=True)
class Config:
    """How finely keys and queries are grouped, and how many keys are attended to exactly."""

    leaf: Annotated[int, Field(ge=1)] = 32
    """Largest number of keys that share a centroid."""
    near: Annotated[int, Field(ge=0)] = 0
    """Leaves whose keys a block of queries attends to exactly; 0 for centroids only."""
    block: Annotated[int, Field(ge=0)] = 64
    """Largest number of queries that share their centroids and near leaves, causal of a chunk, on average; 0 for
    centroids that all queries share."""
    chunk: Annotated[int, Field(ge=16)] = 1024
    """Length of the exact causal chunks."""
    min_length: Annotated[int, Field(ge=0)] = 2048
    """Fewer keys than this, twice as many when causal, are attended to exactly; with few queries more."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, call: Call, config: Config | None = None, state: State | None = None
) -> tuple[Tensor, Tensor]:
    """Approximate attention; exact where it is short, with windows and with biases.

    Args:
        q: [B, Hq, nq, d]
        k: [B, Hkv, n, d]
        v: [B, Hkv, n, dv]
        call: Scale and masks; nothing is drawn, so the seed does not matter.
        config: Settings.
        state: `features` and `query_features` [Hkv, d, m] and `value_features` [Hkv, dv, m], fixed directions for the
            trees; those that are not given are made from each input.

    Returns:
        out [B, Hq, nq, dv] and lse [B, Hq, nq], the log of the estimated denominator.
    """
    config = config or Config()
    n, nq = k.shape[2], q.shape[2]
    groups = q.shape[1] // k.shape[1]
    plain = call.window is None and call.bias is None and n > 1 and not short(call, groups, nq, n, config.min_length)
    if call.causal:
        if not plain or nq != n or n <= config.chunk:
            return exact.attend(q, k, v, call)
        return attend_causal(q, k, v, call, config.chunk, (config.block, config.leaf, config.near))
    if not plain:
        return exact.attend(q, k, v, call)
    batch, heads, kv = q.shape[0], q.shape[1], k.shape[1]
    rows = q.reshape(batch * kv, heads // kv * nq, q.shape[-1])
    valid, real = counted(call, kv, heads // kv, nq, n)
    sizes = (config.block or rows.shape[1], config.leaf, config.near)
    out, lse = attend_in_blocks(rows, k.flatten(0, 1), v.flatten(0, 1), valid, real, call.scale, sizes, state)
    return out.reshape(batch, heads, nq, -1), lse.reshape(batch, heads, nq)


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
    weight = w.unflatten(1, (-1, leaf))  # type: ignore[no-untyped-call]
    return centroids(ordered(k, perm), weight), centroids(ordered(v, perm), weight)


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
    batch, heads, nq, width = q.shape
    blocks, size = sel.shape[2], k.shape[2] // bias.shape[-1]
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    order, query_order = perm.flatten(0, 1), query_order.flatten(0, 1)
    centre = torch.cat(summaries(keys, values, order, w.flatten(0, 1), size), -1)
    centre = centre.unsqueeze(1).expand(-1, blocks, -1, -1)
    far_bias = bias.flatten(0, 1).unsqueeze(1).expand(-1, blocks, -1)
    table = ordered(torch.cat([keys, values], -1), order).reshape(batch * heads, -1, size, width + v.shape[-1])
    rows = ordered(q.flatten(0, 1), query_order).reshape(batch * heads, blocks, -1, width)
    found = near_and_far(rows, table, None, centre, far_bias, sel.flatten(0, 1), scale)
    out, lse = in_place(*found, query_order, nq)
    return out.reshape(batch, heads, nq, -1), lse.reshape(batch, heads, nq)
