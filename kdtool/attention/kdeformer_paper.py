"""KDEformer with pilot probabilities: keys are drawn by how much attention a few exact softmax rows give them.

The proof draws key j in proportion to the squared norm of its column of the attention matrix; the published code
never estimates it. Here the exact softmax rows P of pilot queries do: beta_j = mean_i P_ij^2, and
p_j ~ sqrt(beta_j) |v_j - mean v|, nine parts in ten, the tenth uniform. Positions are drawn systematically along the
hash order, (u + r) / m, which spreads them over the blocks. The rest is `kdeformer`.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kdtool.attention import _lsh
from kdtool.attention._base import Call, State, generator
from kdtool.attention._hashed import hashed
from kdtool.attention._leaves import pick

paper: str = (
    "Zandieh et al., KDEformer: Accelerating Transformers via Kernel Density Estimation, ICML 2023, arXiv 2302.02451"
)
causal: bool = True

_UNIFORM = 0.1
"""Share of the probability that every key gets alike."""


@dataclass(frozen=True, slots=True)
class Config:
    """Sizes of block and sample."""

    bucket: Annotated[int, Field(ge=1)] = 256
    """b, keys in a block."""
    samples: Annotated[int, Field(ge=1)] = 256
    """m, keys drawn for the rest."""
    pilots: Annotated[int, Field(ge=1)] = 64
    """Queries whose exact softmax rows give the probabilities."""
    projections: Annotated[int, Field(ge=1, le=30)] = 7
    """r, hyperplanes of the hash."""
    min_length: Annotated[int, Field(ge=0)] = 4096
    """Fewer keys than this, twice as many when causal, are attended to exactly; with few queries more."""


def probabilities(pilots: Tensor, k: Tensor, v: Tensor, scale: float, valid: Tensor | None = None) -> Tensor:
    """Probabilities of drawing keys.

    Args:
        pilots: [X, rows, d] queries.
        k: [X, n, d]
        v: [X, n, dv]
        scale: Factor of the logits.
        valid: [X, n] keys that count; None for all.

    Returns:
        [X, n] of sum 1, 0 for keys that do not count.
    """
    logits = pilots.float() @ k.float().mT * scale
    v = v.float()
    if valid is None:
        alike = torch.full(k.shape[:2], 1.0 / k.shape[1], device=k.device)
    else:
        logits = logits.masked_fill(~valid.unsqueeze(1), float("-inf"))
        v = v.masked_fill(~valid.unsqueeze(-1), 0.0)
        alike = valid / valid.sum(1, keepdim=True).clamp_min(1)
    p = torch.softmax(logits, -1).nan_to_num(0.0)
    beta = p.square().mean(1)
    middle = (alike.unsqueeze(1) @ v).squeeze(1)
    weight = beta.sqrt() * torch.linalg.vector_norm(v - middle.unsqueeze(1), dim=-1)
    if valid is not None:
        weight = weight * valid
    total = weight.sum(1, keepdim=True)
    weight = torch.where(total > 0, weight / total.clamp_min(1e-30), alike)
    mixed: Tensor = (1.0 - _UNIFORM) * weight + _UNIFORM * alike
    return mixed


def systematic(p: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """`count` positions along p [X, n], one in each of `count` equal shares of the probability."""
    start = torch.rand((p.shape[0], 1), generator=draw, device=p.device)
    points = (start + torch.arange(count, device=p.device)) / count
    ends = p.double().cumsum(-1)
    last = (p > 0).long().cumsum(-1).argmax(-1, keepdim=True)  # rounding must not lead past the last key that counts
    return torch.minimum(torch.searchsorted(ends, points.double() * ends[:, -1:]), last)


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
    ) -> tuple[Tensor, Tensor]:
        pilots = pick(rows, real, c.pilots)
        p = probabilities(pilots, k, v, call.scale, valid).gather(1, order)
        samples = systematic(p, c.samples, generator(call.seed + 1, q.device))
        return samples, _lsh.log_weights(p, samples)

    return hashed(q, k, v, call, c.bucket, c.projections, c.min_length, draw)
