"""KDEformer: exact attention to the block of keys that hash alike, and an importance sample of the others.

Queries and keys are sorted by hyperplane hashes in an order that changes one bit at a time. Block t of the
queries attends exactly to block t of the keys; m keys, drawn with P_j ~ |V+_j| / lam + 1/n (V+ = [V, 1], lam the
largest eigenvalue of V+^T V+), stand for the rest with weights 1 / (m P_j). The defects of the published code
(no maximum subtracted, fixed multiples, no masks) are mended. Causal attention is halved as in HyperAttention, without
its look ahead.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kdtool.attention import _lsh
from kdtool.attention._base import Call, State, generator
from kdtool.attention._hashed import hashed

paper: str = (
    "Zandieh et al., KDEformer: Accelerating Transformers via Kernel Density Estimation, ICML 2023, arXiv 2302.02451"
)
causal: bool = True

_STEPS = 32
"""Power iterations for lam."""


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


def probabilities(v: Tensor, valid: Tensor | None = None) -> Tensor:
    """P_j ~ |V+_j| / lam + 1/n over keys.

    Args:
        v: [X, n, dv]
        valid: [X, n] keys that count; None for all.

    Returns:
        [X, n] of sum 1, 0 for keys that do not count.
    """
    plus = functional.pad(v.float(), (0, 1), value=1.0)
    if valid is not None:
        plus = plus * valid.unsqueeze(-1)
    gram = plus.mT @ plus
    x = torch.ones_like(gram[..., :1])
    for _ in range(_STEPS):
        x = gram @ x
        x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-30)
    largest = (x.mT @ gram @ x).squeeze(-1).clamp_min(1e-30)
    p: Tensor = torch.linalg.vector_norm(plus, dim=-1) / largest + 1.0 / v.shape[1]
    if valid is not None:
        p = p * valid
    total: Tensor = p.sum(-1, keepdim=True)
    return p / total.clamp_min(1e-30)


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
        p = probabilities(v, valid).gather(1, order)
        safe = p + (p.sum(-1, keepdim=True) == 0)
        samples = torch.multinomial(safe, c.samples, replacement=True, generator=generator(call.seed + 1, q.device))
        return samples, _lsh.log_weights(p, samples)

    return hashed(q, k, v, call, c.bucket, c.projections, c.min_length, draw)
