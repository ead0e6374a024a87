"""What an attention operator gets and gives back.

An operator is a file with `Config` (a frozen dataclass of literal defaults), the literals `paper` and
`causal`, and

    attend(q, k, v, call, config, state) -> (out, lse)

Shapes, with B sequences, query heads Hq, key heads Hkv (Hq is a multiple of Hkv; query head h uses key
head h // (Hq / Hkv)), nq queries, n keys: q [B, Hq, nq, d], k [B, Hkv, n, d], v [B, Hkv, n, dv];
out [B, Hq, nq, dv] in the type of q; lse [B, Hq, nq] float32, the logarithm of the (estimated) softmax
denominator, or None where an operator has none. Rows that see no key are zero, with lse -inf.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

State = Mapping[str, Tensor]
"""What an operator draws once, when a model is patched: random projections. Saved beside the model."""


@dataclass(frozen=True, slots=True)
class Call:
    """One attention call, beside its tensors.

    Attributes:
        scale: Factor of the logits, usually d^-1/2.
        key_mask: [B, n] bool, True where a key may be attended; None if all may.
        causal: True if query i sees keys up to n - nq + i only.
        window: Keys further away than this are not seen: distance i - j < window if causal, else
            |i - j| <= window; None without a window.
        bias: Added to the logits, [B or 1, Hq or 1, nq, n]; only `exact` takes one.
        seed: Fixes what an operator draws in a call; the global generators are never touched.
    """

    scale: float
    key_mask: Tensor | None = None
    causal: bool = False
    window: int | None = None
    bias: Tensor | None = None
    seed: int = 0


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Key heads repeated for the query heads that share them: [B, Hkv, n, d] to [B, heads, n, d]."""
    own = x.shape[1]
    if own == heads:
        return x
    return x[:, :, None].expand(-1, -1, heads // own, -1, -1).reshape(x.shape[0], heads, *x.shape[2:])


def generator(seed: int, device: torch.device) -> torch.Generator:
    """A generator of its own for one call."""
    return torch.Generator(device=device).manual_seed(seed)


def counted(call: Call, kv: int, groups: int, nq: int, n: int) -> tuple[Tensor | None, Tensor | None]:
    """Which keys and which rows count, with the query heads of a key head folded into its rows.

    In self-attention a position that is padding as a key is padding as a query: its row must not steer
    what other rows get.

    Args:
        call: Holds the key mask [B, n].
        kv: Key heads.
        groups: Query heads of a key head.
        nq: Queries.
        n: Keys.

    Returns:
        [B kv, n] and [B kv, groups nq] bool; None where all count.
    """
    if call.key_mask is None:
        return None, None
    keys = call.key_mask.repeat_interleave(kv, 0)
    return keys, keys.repeat(1, groups) if nq == n else None


def short(call: Call, groups: int, nq: int, n: int, least: int) -> bool:
    """Whether attention is too small for an approximation to pay.

    Args:
        call: Whether it is causal: then half of the pairs are not seen, and twice as many keys are wanted.
        groups: Query heads of a key head.
        nq: Queries.
        n: Keys.
        least: Fewest keys, and fewest queries to as many keys; with more keys fewer queries will do.
    """
    least = 2 * least if call.causal else least
    return n < least or groups * nq * n < least**2
