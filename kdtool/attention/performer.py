"""Performer (FAVOR+): the softmax kernel by positive orthogonal random features.

With x' = sqrt(scale) x and features f_w(x) = exp(w . x' - |x'|^2 / 2) for w ~ N(0, I), orthogonal in groups of d:
exp(scale q . k) = E f_w(q) f_w(k), so keys are summed once for each feature and queries read the sums. All sums are
kept as logarithms and means: feature w answers with the softmax mean of the values over w . k' - |k'|^2 / 2, and a
query takes the softmax mean of the features' answers, so that no logit overflows. Causal attention reads the prefix
sums of the chunks before its own and attends exactly within it: sums that stop inside a chunk cannot be scaled
safely without a look at what comes later.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kdtool.attention import exact
from kdtool.attention._base import Call, State, generator, short

paper: str = "Choromanski et al., Rethinking Attention with Performers, ICLR 2021, arXiv 2009.14794"
causal: bool = True
never_exact: str = "random features stand for every key: the error falls with their number and never is 0"
"""Why no setting leaves nothing out."""

_HIDDEN = float("-inf")
_NOTHING = 1e-30
"""Stands in for sums over no keys; sums over some are at least 1."""


@dataclass(frozen=True, slots=True)
class Config:
    """Number of features, and length of causal chunks."""

    features: Annotated[int, Field(ge=1)] = 256
    """m, random features."""
    chunk: Annotated[int, Field(ge=1)] = 256
    """Keys of a chunk of causal attention."""
    min_length: Annotated[int, Field(ge=0)] = 8192
    """Fewer keys than this, twice as many when causal, are attended to exactly; with few queries more."""


def directions(count: int, width: int, seed: int, device: torch.device, kind: torch.dtype) -> Tensor:
    """Standard normal directions, orthogonal within groups of `width`.

    Args:
        count: m, directions.
        width: d, their width.
        seed: Fixes the draw; the same on every device.
        device: Where to put them.
        kind: Their type.

    Returns:
        [m, d]
    """
    draw = generator(seed, torch.device("cpu"))
    groups = -(-count // width)
    gauss = torch.randn((groups, width, width), generator=draw, dtype=torch.float64)
    turned, upper = torch.linalg.qr(gauss)
    turned = turned * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # without this not uniform
    lengths = torch.randn((groups, width, width), generator=draw, dtype=torch.float64).norm(dim=-1, keepdim=True)
    found: Tensor = (turned.mT * lengths).flatten(0, 1)[:count].to(device, kind)
    return found


def attend(
    q: Tensor, k: Tensor, v: Tensor, call: Call, config: Config | None = None, state: State | None = None
) -> tuple[Tensor, Tensor]:
    """Approximate attention; exact where it is short, with windows and biases, and causal across lengths.

    Args:
        q: [B, Hq, nq, d]
        k: [B, Hkv, n, d]
        v: [B, Hkv, n, dv]
        call: Scale, key mask, seed of the features.
        config: Settings.
        state: Not used.

    Returns:
        out [B, Hq, nq, dv] and lse [B, Hq, nq], the log of the estimated denominator, without a gradient.
    """
    c = config or Config()
    batch, heads, nq, width = q.shape
    kv, n = k.shape[1:3]
    across = call.causal and (nq != n or n <= c.chunk)
    if across or call.window is not None or call.bias is not None or short(call, heads // kv, nq, n, c.min_length):
        return exact.attend(q, k, v, call)
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    root = abs(call.scale) ** 0.5
    rows = q.to(kind).reshape(batch * kv, heads // kv, nq, width) * (root if call.scale >= 0 else -root)
    keys, values = k.to(kind).flatten(0, 1) * root, v.to(kind).flatten(0, 1)
    seen = torch.ones((batch, n), dtype=torch.bool, device=q.device) if call.key_mask is None else call.key_mask
    seen = seen.repeat_interleave(kv, 0)
    turned = directions(c.features, width, call.seed, q.device, kind)
    if call.causal:
        fill = -n % c.chunk
        rows, keys, values = (functional.pad(x, (0, 0, 0, fill)) for x in (rows, keys, values))
        seen = functional.pad(seen, (0, fill))
    size = c.chunk if call.causal else n
    sets, chunks = batch * kv, keys.shape[1] // size
    keys, values = (x.reshape(sets, chunks, size, x.shape[-1]) for x in (keys, values))
    seen = seen.reshape(sets, chunks, size)
    rows = rows.reshape(sets, heads // kv, chunks, rows.shape[2] // chunks, width)
    logs, answers = _sums(turned, keys, values, seen)
    if call.causal:
        logs, answers = _before(logs, answers)
    out, lse = _read(rows, turned, logs, answers, (keys, values, seen) if call.causal else None)
    out, lse = out.flatten(2, 3)[:, :, :nq], lse.flatten(2, 3)[:, :, :nq]
    return out.reshape(batch, heads, nq, -1).to(q.dtype), lse.reshape(batch, heads, nq).detach()


def _sums(turned: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """What each feature holds of each chunk: log of the sum of its kernel [X, T, m], and its answer [X, T, m, dv]."""
    logits = turned @ keys.mT - 0.5 * keys.square().sum(-1).unsqueeze(-2)
    logits = logits.masked_fill(~seen.unsqueeze(-2), _HIDDEN)
    top = _top(logits)
    p = torch.exp(logits - top)
    total = p.sum(-1, keepdim=True)
    answers = p @ values / total.clamp_min(_NOTHING)
    return _log(top, total), answers


def _top(logits: Tensor) -> Tensor:
    """Largest logit of a row [..., 1], 0 where all are hidden; constant in the gradient, where it cancels."""
    top = logits.detach().amax(-1, keepdim=True)
    return top.masked_fill(top == _HIDDEN, 0.0)


def _log(top: Tensor, total: Tensor) -> Tensor:
    """Log of exp(top) total [...], -inf where nothing was summed."""
    return (top + torch.log(total.clamp_min(_NOTHING))).masked_fill(total == 0, _HIDDEN).squeeze(-1)


def _before(logs: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over all chunks before each chunk, from sums of the chunks; shapes as of `_sums`.

    One chunk after the other, so that the scale of a prefix hangs on nothing that comes later.
    """
    log, answer = torch.full_like(logs[:, 0], _HIDDEN), torch.zeros_like(answers[:, 0])
    found = [(log, answer)]
    for own_log, own_answer in zip(logs.unbind(1)[:-1], answers.unbind(1)[:-1], strict=True):
        pair = torch.stack([log, own_log], -1)
        top = _top(pair)
        share = torch.exp(pair - top)
        total = share.sum(-1, keepdim=True)
        share = share / total.clamp_min(_NOTHING)
        answer = share[..., :1] * answer + share[..., 1:] * own_answer
        log = _log(top, total)
        found.append((log, answer))
    return torch.stack([log for log, _ in found], 1), torch.stack([answer for _, answer in found], 1)


def _read(
    rows: Tensor, turned: Tensor, logs: Tensor, answers: Tensor, own: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Answers to queries.

    Args:
        rows: [X, G, T, rows, d]
        turned: [m, d]
        logs: [X, T, m] of `_sums` or `_before`.
        answers: [X, T, m, dv]
        own: Keys [X, T, rows, d], values and which of them count [X, T, rows] that a row attends to exactly, up to
            its own place; None for none.

    Returns:
        out [X, G, T, rows, dv] and lse [X, G, T, rows].
    """
    norm = 0.5 * rows.square().sum(-1, keepdim=True)
    count = torch.log(torch.tensor(float(turned.shape[0]), dtype=rows.dtype, device=rows.device))
    logits = rows @ turned.mT + logs[:, None, :, None] - norm - count
    parts = [(logits, answers)]
    if own is not None:
        keys, values, seen = own
        lower = torch.ones((keys.shape[2],) * 2, dtype=torch.bool, device=rows.device).tril()
        near = (rows @ keys.unsqueeze(1).mT).masked_fill(~(seen.unsqueeze(-2) & lower).unsqueeze(1), _HIDDEN)
        parts.append((near, values))
    top = _top(torch.cat([part.detach().amax(-1, keepdim=True) for part, _ in parts], -1))
    shares = [torch.exp(part - top) for part, _ in parts]
    total = torch.stack([share.sum(-1, keepdim=True) for share in shares]).sum(0)
    mixed = torch.stack([share @ x.unsqueeze(1) for share, (_, x) in zip(shares, parts, strict=True)]).sum(0)
    return mixed / total.clamp_min(_NOTHING), _log(top, total)
