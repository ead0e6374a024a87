"""HyperAttention: exact attention to the block of keys that hash alike, and a uniform sample of the others.

As `kdeformer`, with samples of equal weight n / m; those of a query's own block are left out, which the published
float32 code forgets. Causal attention is computed exactly.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kdtool.attention import _lsh, exact
from kdtool.attention._base import Call, State, generator

paper: str = "Han et al., HyperAttention: Long-context Attention in Near-Linear Time, ICLR 2024, arXiv 2310.05869"
causal: bool = False


@dataclass(frozen=True, slots=True)
class Config:
    """Sizes of block and sample."""

    bucket: Annotated[int, Field(ge=1)] = 256
    """b, keys in a block."""
    samples: Annotated[int, Field(ge=0)] = 256
    """m, keys drawn for the rest."""
    projections: Annotated[int, Field(ge=1, le=30)] = 7
    """r, hyperplanes of the hash."""
    min_length: Annotated[int, Field(ge=0)] = 4096
    """Fewer keys than this are attended to exactly."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, call: Call, config: Config | None = None, state: State | None = None
) -> tuple[Tensor, Tensor]:
    """Approximate attention; exact below `min_length` keys, in one block, causal, with windows and with biases.

    Args:
        q: [B, Hq, nq, d]
        k: [B, Hkv, n, d]
        v: [B, Hkv, n, dv]
        call: Scale, key mask, seed of hyperplanes and samples.
        config: Settings.
        state: Not used.

    Returns:
        out [B, Hq, nq, dv] and lse [B, Hq, nq], the log of the estimated denominator.
    """
    config = config or Config()
    n = k.shape[2]
    if call.causal or call.window is not None or call.bias is not None or n <= config.bucket or n < config.min_length:
        return exact.attend(q, k, v, call)
    rows, keys, values, valid = _lsh.folded(q, k, v, call)
    with torch.no_grad():
        query_order, key_order = _lsh.sorted_by_hash(rows, keys, valid, config.projections, call.seed)
        samples = weights = None
        if config.samples:
            draw = torch.rand(len(keys), config.samples, generator=generator(call.seed + 1, q.device), device=q.device)
            count = torch.full((len(keys), 1), n, device=q.device) if valid is None else valid.sum(1, keepdim=True)
            samples = (draw * count).long().clamp_max(n - 1)  # keys that count come first in the order
            weights = (torch.log(count.float()) - math.log(config.samples)).expand(-1, config.samples)
    out, lse = _lsh.blocks_and_samples(
        rows, keys, values, query_order, key_order, config.bucket, samples, weights, call.scale, valid
    )
    return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])
