"""Causal attention in chunks: exact within a chunk, and centroids of the leaves of earlier chunks.

Nothing that comes later may move a row, not by a bit: the leaves of a chunk, their centroids and their biases are made
from its own keys and queries, and are read by later chunks only.
"""

import torch
from torch import Tensor

from kdtool.attention._base import Call, counted
from kdtool.attention._flash import Part, hiding, merged
from kdtool.attention._leaves import pick, rows_for_moments, summarise


def attend_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, call: Call, chunk: int, pilots: int, leaf: int
) -> tuple[Tensor, Tensor]:
    """Causal self-attention.

    Args:
        q: [B, Hq, n, d]
        k: [B, Hkv, n, d]
        v: [B, Hkv, n, dv]
        call: Scale and key mask.
        chunk: Keys of a chunk.
        pilots: Queries of a chunk whose exact softmax rows weight its keys.
        leaf: Largest leaf.

    Returns:
        out [B, Hq, n, dv] and lse [B, Hq, n].
    """
    batch, heads, n, width = q.shape
    kv = k.shape[1]
    sets, groups = batch * kv, heads // kv
    rows = q.reshape(sets, groups, n, width)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    valid, _ = counted(call, kv, groups, n, n)
    read = (n - 1) // chunk  # chunks that later ones read
    past = slice(0, read * chunk)
    keys, values = (x[:, past].reshape(sets * read, chunk, x.shape[-1]) for x in (k, v))
    own = rows[:, :, past].reshape(sets, groups, read, chunk, width).transpose(1, 2)
    own = own.reshape(sets * read, groups * chunk, width)
    seen = None if valid is None else valid[:, past].reshape(sets * read, chunk)
    real = None if seen is None else seen.repeat(1, groups)
    found = summarise(keys, values, seen, rows_for_moments(own, real), pick(own, real, pilots), call.scale, leaf)
    leaves = found.k.shape[1]
    far_k, far_v, bias = (x.reshape(sets, 1, read * leaves, -1) for x in (found.k, found.v, found.bias))
    outs, sums = [], []
    for number in range(read + 1):
        here = slice(number * chunk, min((number + 1) * chunk, n))
        hidden = None
        if valid is not None:
            hidden = hiding(~valid[:, here])[:, None, None]
        own_k, own_v = (x[:, None, here].expand(-1, groups, -1, -1) for x in (k, v))
        parts = [Part(own_k, own_v, hidden, True)]
        if number:
            before = slice(0, number * leaves)
            seen_k, seen_v = (x[:, :, before].expand(-1, groups, -1, -1) for x in (far_k, far_v))
            parts.append(Part(seen_k, seen_v, bias[:, :, before].mT))
        out, lse = merged(rows[:, :, here], parts, call.scale)
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs, 2).reshape(batch, heads, n, -1), torch.cat(sums, 2).reshape(batch, heads, n)
