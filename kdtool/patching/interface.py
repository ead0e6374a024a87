"""The attention function that transformers calls in a patched model, and the mask function that goes with it.

Both are registered under the name `kdtool_kde`. The mask function keeps the padding mask two-dimensional
where the pattern is full, causal or a sliding window, and gives the full boolean mask in all other cases
(packed sequences, blocks, decoding against a cache), which the attention function then serves exactly,
by the very call that an unpatched model makes.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kdtool.attention._base import Call, State, repeat_heads
from kdtool.errors import ModelProblem
from kdtool.registry import ATTENTION

NAME = "kdtool_kde"
"""Name of the attention implementation; without `flash`, `/` and `|`, which transformers reads meaning into."""

FEWEST_QUERIES = 64
"""Fewer queries than this are answered exactly: decoding, and shapes where there is nothing to gain."""

_ATTRIBUTE = "kde_layer"
_MEMO = "kdtool_full_mask"
_PLAIN = ("causal_mask_function", "bidirectional_mask_function")
_WINDOWS = (
    "sliding_window_overlay.<locals>.inner_mask",
    "sliding_window_bidirectional_overlay.<locals>.inner_mask",
)


@dataclass(frozen=True)
class Layer:
    """How one attention module computes its attention.

    Attributes:
        name: Name of the module, as seen from the body of the model (without the prefix of a head).
        method: Attention operator; `exact` for a layer left as it was.
        settings: Settings of the operator that were chosen.
        min_length: Fewer keys than this are attended to exactly.
        seed: Fixes what the operator draws in a call.
        state: Projections fixed when the layer was patched.
        reason: Why the layer was left exact; None for one that was not.
    """

    name: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    min_length: int = 0
    seed: int = 0
    state: State | None = None
    reason: str | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """The operator's output [B, Hq, nq, dv].

        Queries at padding are zeroed first: operators sort queries, and padding must not steer the others.
        """
        if call.key_mask is not None and q.shape[2] == k.shape[2]:
            q = q.masked_fill(~call.key_mask[:, None, :, None], 0.0)
        run, config = _operator(self.method, tuple(sorted(self.settings.items())))
        out: Tensor = run(q, k, v, call, config, self.state)[0]
        return out


@lru_cache(maxsize=256)
def _operator(method: str, settings: tuple[tuple[str, Any], ...]) -> tuple[Callable[..., Any], Any]:
    """`attend` and the built settings; the operator's own least length gives way to the layer's."""
    values = dict(settings)
    if any(setting.name == "min_length" for setting in ATTENTION.info(method).settings):
        values["min_length"] = 0
    return ATTENTION.get(method), ATTENTION.build_config(method, values)


def layer_of(module: nn.Module) -> Layer | None:
    """What a module was patched with; None for one that was not patched."""
    found: Layer | None = getattr(module, _ATTRIBUTE, None)
    return found


def set_layer(module: nn.Module, layer: Layer | None) -> None:
    """Patch a module, or take the patch away."""
    if layer is None:
        if layer_of(module) is not None:
            delattr(module, _ATTRIBUTE)
    else:
        setattr(module, _ATTRIBUTE, layer)


class Seen(NamedTuple):
    """One call of the attention function.

    Attributes:
        module: Who called.
        q: [B, Hq, nq, d]
        k: [B, Hkv, n, d]
        v: [B, Hkv, n, dv]
        call: Scale, padding, causality and window, as far as `reason` is None.
        reason: Why this call cannot be approximated; None if it can.
        approximate: True if it was.
    """

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    call: Call
    reason: str | None
    approximate: bool


Watcher = Callable[[Seen], None]
_watchers: list[Watcher] = []


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Show every call of the attention function to `watcher` while the context lasts."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: exact attention, or the operator that the module was patched with.

    Args:
        module: The attention module.
        query: [B, Hq, nq, d]
        key: [B, Hkv, n, d]
        value: [B, Hkv, n, dv]
        attention_mask: [B, n] padding mask, a full mask [B, 1 or Hq, nq, n], or None.
        dropout: Probability; applied by exact attention only.
        scaling: Factor of the logits (default: d^-1/2).
        is_causal: Whether query i sees the keys up to i (default: as the module says).
        sliding_window: Keys at this distance and beyond are not seen.
        position_bias: Added to the logits.
        softcap: Bound of the logits.
        more: Whatever else a model passes.

    Returns:
        [B, nq, Hq, dv] and None.

    Raises:
        ModelProblem: attention weights are asked for, which are never formed.
    """
    if more.get("output_attentions"):
        raise ModelProblem(
            "a model with patched attention cannot return attention weights",
            why="they are never formed",
            hint="load it with plain transformers, attn_implementation='eager', and output_attentions=True",
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    n = key.shape[2]
    reason = _why_exact(query, key, attention_mask, causal, position_bias, softcap, more)
    window = _window(sliding_window, causal, n)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    layer = layer_of(module)
    chosen = (
        layer is not None
        and reason is None
        and layer.reason is None
        and n >= layer.min_length
        and query.shape[2] >= FEWEST_QUERIES
    )
    padding = attention_mask.bool() if reason is None and attention_mask is not None else None
    call = Call(scale, padding, causal, window, None, layer.seed if layer is not None else 0)
    for watcher in tuple(_watchers):
        watcher(Seen(module, query, key, value, call, reason, chosen))
    if chosen:
        assert layer is not None
        return layer.attend(query, key, value, call).transpose(1, 2).contiguous(), None
    if attention_mask is None or attention_mask.dim() == 2:
        attention_mask = _full_mask(attention_mask, query, n, causal, sliding_window)
    if softcap is not None:
        return _capped(query, key, value, attention_mask, scale, softcap, causal), None
    out, _ = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        position_bias=position_bias,
        **more,
    )
    return out, None


def _why_exact(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    causal: bool,
    position_bias: Tensor | None,
    softcap: float | None,
    more: dict[str, Any],
) -> str | None:
    """Why a call must be answered exactly; None if it need not."""
    if position_bias is not None or (mask is not None and mask.dim() == 4 and mask.is_floating_point()):
        return "a bias is added to all logits, which no sample or centroid of the keys can carry"
    if softcap is not None:
        return "the logits are capped"
    if more.get("cache") is not None:
        return "the keys are in a paged cache"
    if _varies(key.shape[2]) or _varies(query.shape[2]):
        return "the length is not known while a graph with varying length is traced"
    if causal and query.shape[2] != key.shape[2]:
        return "the queries go on after cached keys"
    if mask is not None and (mask.dim() != 2 or mask.shape[1] != key.shape[2]):
        return "the mask is neither padding nor causal nor a window"
    return None


def _varies(length: Any) -> bool:
    """True for a length that a traced graph leaves open."""
    return isinstance(length, torch.SymInt)


def _window(sliding_window: int | None, causal: bool, n: int) -> int | None:
    """The window as a `Call` has it: transformers' excludes the distance it names, in both directions."""
    if sliding_window is None or sliding_window >= n:
        return None
    return sliding_window if causal else sliding_window - 1


def _full_mask(
    padding: Tensor | None, query: Tensor, n: int, causal: bool, sliding_window: int | None
) -> Tensor | None:
    """The boolean mask that an unpatched model would have made, [B or 1, 1, nq or 1, n]; None if all is seen."""
    nq = query.shape[2]
    window = None if sliding_window is None or sliding_window >= n else sliding_window
    if padding is None:
        return None if window is None else _banded(nq, n, causal, window, query.device)
    seen = padding.bool()[:, None, None]
    if not causal and window is None:
        return seen.expand(-1, -1, nq, -1)
    memo: dict[Any, Tensor] = padding.__dict__.setdefault(_MEMO, {})  # all layers of a pass share the padding mask
    mark = (nq, n, causal, window)
    if mark not in memo:
        memo[mark] = seen & _banded(nq, n, causal, window, query.device)
    return memo[mark]


def _banded(nq: int, n: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    distance = torch.arange(n - nq, n, device=device)[:, None] - torch.arange(n, device=device)
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        seen = seen & (distance < window) & (distance > -window)
    return seen[None, None]


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, causal: bool) -> Tensor:
    """Exact attention with capped logits, [B, nq, Hq, dv]; forms all of them."""
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    logits = softcap * torch.tanh(q @ k.mT * scale / softcap)
    if mask is None and causal and q.shape[2] > 1:
        mask = _banded(q.shape[2], k.shape[2], True, None, q.device)
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min) if mask.dtype == torch.bool else logits + mask
    p = torch.softmax(logits, -1, dtype=torch.float32).to(q.dtype)
    return (p @ v).transpose(1, 2).contiguous()


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **more: Any,
) -> Tensor | None:
    """What transformers calls to make a mask: the padding mask [B, n], None, or the full boolean mask."""
    start = 0 if isinstance(q_offset, Tensor) else q_offset
    plain = q_length == kv_length and not isinstance(q_offset, Tensor) and start == 0 and kv_offset == 0
    cross = q_length != kv_length and mask_function is not None and mask_function.__name__ == _PLAIN[1]
    if mask_function is None or not (plain or (cross and kv_offset == 0)) or not _known(mask_function):
        full: Tensor | None = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            **({} if mask_function is None else {"mask_function": mask_function}),
            attention_mask=attention_mask,
            **more,
        )
        return full
    if attention_mask is None or attention_mask.shape[1] != kv_length:
        return attention_mask if attention_mask is None else _filled(attention_mask, kv_length)
    if torch.compiler.is_exporting():
        return attention_mask
    return None if bool(attention_mask.all()) else attention_mask


def _filled(attention_mask: Tensor, length: int) -> Tensor:
    """Padding masks are cut from the right or filled up, as transformers does."""
    if attention_mask.shape[1] > length:
        return attention_mask[:, -length:]
    return nn.functional.pad(attention_mask, (0, length - attention_mask.shape[1]))


def _known(function: Any) -> bool:
    """True for masks that are full, causal or a sliding window."""
    if getattr(function, "__module__", "") != "transformers.masking_utils":
        return False
    name = function.__qualname__
    if name in _PLAIN or name in _WINDOWS:
        return True
    if name == "and_masks.<locals>.and_mask":
        cells = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
        return all(_known(inner) for inner in cells["mask_functions"].cell_contents)
    return False


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
