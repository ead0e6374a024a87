"""HyperAttention: exact attention to the block of keys that hash alike, and a uniform sample of the others.

As `kdeformer`, with samples of equal weight n / m; those of a query's own block are left out, which the published
float32 code forgets. Causal attention is halved, without the look ahead of the published form.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kdtool.attention._base import Call, State, generator
from kdtool.attention._hashed import hashed

paper: str = "Han et al., HyperAttention: Long-context Attention in Near-Linear Time, ICLR 2024, arXiv 2310.05869"
causal: bool = True


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
    """Fewer keys than this, twice as many when causal, are attended to exactly; with few queries more."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, call: Call, config: Config | None = None, state: State | None = None
) -> tuple[Tensor, Tensor]:
    """Approximate attention; see `kdtool.attention._hashed.hashed` for when it is exact.

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
    c = config or Config()

    def draw(
        rows: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, real: Tensor | None, order: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        if not c.samples:
            return None
        sets, n = k.shape[:2]
        place = torch.rand((sets, c.samples), generator=generator(call.seed + 1, q.device), device=q.device)
        count = torch.full((sets, 1), n, device=q.device) if valid is None else valid.sum(1, keepdim=True)
        samples = (place * count).long().clamp_max(n - 1)  # keys that count come first in the order
        return samples, torch.log(count / c.samples).expand(-1, c.samples)

    return hashed(q, k, v, call, c.bucket, c.projections, c.min_length, draw)
