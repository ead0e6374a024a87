"""What the operators that hash have in common: when they are exact, and which form they take otherwise."""

import torch
from torch import Tensor

from kdtool.attention import exact
from kdtool.attention._base import Call, counted, generator, short
from kdtool.attention._halving import halved
from kdtool.attention._lsh import Draw, blocks_and_samples, codes, gray_rank, last, order_of

_CHUNK_BUCKETS = 4
"""Buckets in a chunk that causal attention answers exactly."""


def hashed(
    q: Tensor, k: Tensor, v: Tensor, call: Call, bucket: int, projections: int, min_length: int, draw: Draw
) -> tuple[Tensor, Tensor]:
    """Attention to blocks that hash alike and to samples; query heads that share a key head are rows of one set.

    Exact where it is short, in one block, with windows and biases, and causal with other queries than keys.

    Args:
        q: [B, Hq, nq, d]
        k: [B, Hkv, n, d]
        v: [B, Hkv, n, dv]
        call: Scale, key mask, seed.
        bucket: Keys in a block.
        projections: Hyperplanes of the hash.
        min_length: Fewest keys.
        draw: Chooses the samples.

    Returns:
        out [B, Hq, nq, dv] and lse [B, Hq, nq], the log of the estimated denominator.
    """
    batch, heads, nq, width = q.shape
    kv, n = k.shape[1:3]
    general = call.window is not None or call.bias is not None or (call.causal and nq != n)
    chunk = _CHUNK_BUCKETS * bucket
    if general or short(call, heads // kv, nq, n, min_length) or n <= (chunk if call.causal else bucket):
        return exact.attend(q, k, v, call)
    if call.causal:
        return halved(q, k, v, call, bucket, projections, chunk, draw)
    rows = q.reshape(batch * kv, heads // kv * nq, width)
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    valid, real = counted(call, kv, heads // kv, nq, n)
    with torch.no_grad():
        planes = torch.randn(width, projections, generator=generator(call.seed, q.device), device=q.device)
        query_order, key_order = (
            order_of(last(gray_rank(codes(x.float(), planes), projections), counts, projections))
            for x, counts in ((rows, real), (keys, valid))
        )
        samples, weights = draw(rows, keys, values, valid, real, key_order) or (None, None)
    out, lse = blocks_and_samples(
        rows, keys, values, query_order, key_order, bucket, samples, weights, call.scale, valid
    )
    return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])
