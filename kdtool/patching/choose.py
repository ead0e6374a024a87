"""Settings of an operator for one layer: the cheapest that keep the error bound, and the length from which they pay."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kdtool.attention import exact
from kdtool.attention._base import Call, repeat_heads
from kdtool.patching.capture import Captured
from kdtool.patching.fixed import fix
from kdtool.patching.interface import FEWEST_QUERIES, Layer
from kdtool.registry import ATTENTION

PAYS = 1.05
"""An operator pays where SDPA takes this many times its time; less is noise."""

_ROWS = 256
"""Pilot rows: the queries whose approximate outputs are held against exact ones."""
_TURNS = 5
"""Timed calls of each side, in turn; the least time counts."""
_PATIENCE = 2.0
"""Seconds after which no further turn begins: long calls vary less."""
_SHORTEST = 128

_LEAVES = [
    {"leaf": 128, "near": 0, "block": 256},
    {"leaf": 64, "near": 0, "block": 128},
    {"leaf": 32, "near": 0, "block": 64},
    {"leaf": 16, "near": 0, "block": 64},
    {"leaf": 32, "near": 8, "block": 64},
    {"leaf": 16, "near": 16, "block": 64},
    {"leaf": 16, "near": 32, "block": 64},
]
_CAUSAL_LEAVES = [
    {"leaf": 128, "block": 256},
    {"leaf": 64, "block": 64},
    {"leaf": 32, "block": 32},
    {"leaf": 32, "block": 16},
    {"leaf": 32, "block": 16, "chunk": 2048},
    {"leaf": 16, "block": 16, "chunk": 2048},
]
_BUCKETS = [{"bucket": size, "samples": size} for size in (64, 128, 256, 512)]
_LADDERS: Mapping[str, Sequence[Mapping[str, int]]] = {
    "cluster": _LEAVES,
    "kdeformer": _BUCKETS,
    "kdeformer-paper": _BUCKETS,
    "hyper": _BUCKETS,
    "nystrom": [{"landmarks": count} for count in (32, 64, 128, 256)],
    "performer": [{"features": count} for count in (64, 128, 256, 512)],
}
"""Settings to try, the fastest first; other operators are tried with their defaults."""


@dataclass(slots=True)
class Trial:
    """Settings that were tried.

    Attributes:
        settings: The settings.
        error: Length to relative spectral error of the worst head on the pilot rows.
        ratio: Length to time of SDPA divided by that of the operator.
    """

    settings: dict[str, Any]
    error: dict[int, float] = field(default_factory=dict)
    ratio: dict[int, float] = field(default_factory=dict)


@dataclass(slots=True)
class Choice:
    """What became of one attention module.

    Attributes:
        number: Place among the attention modules.
        layer: The choice itself.
        trials: All settings that were tried; the last one is the choice, unless the layer stays exact.
        mean_error: Error of answering every query with the mean of the values, at the longest length.
        called: Whether the operator was seen to run in this layer of the patched model.
    """

    number: int
    layer: Layer
    trials: list[Trial] = field(default_factory=list)
    mean_error: float | None = None
    called: bool = False


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of a layer.

    Attributes:
        method: Operator.
        fixed: Settings that are not searched.
        max_error: Bound of the error of the worst head.
        lengths: Numbers of keys at which to measure.
        limit: Longest input the model takes; None for no limit.
        min_length: Fewest keys that are approximated, where that is not to be found out by timing.
        seed: Seed of the operator, and of the choice of pilot rows.
        fixed_state: Fix the operator's projections on the calibration rows; see `kdtool.patching.fixed`.
    """

    method: str
    fixed: Mapping[str, Any]
    max_error: float
    lengths: Sequence[int]
    limit: int | None = None
    min_length: int | None = None
    seed: int = 0
    fixed_state: bool = False


def candidates(method: str, fixed: Mapping[str, Any], causal: bool) -> list[dict[str, Any]]:
    """Settings to try, the fastest first; the fixed ones are in all of them."""
    known = {setting.name for setting in ATTENTION.info(method).settings}
    found: list[dict[str, Any]] = []
    for step in _CAUSAL_LEAVES if causal and method == "cluster" else _LADDERS.get(method, [{}]):
        one = {key: value for key, value in step.items() if key in known} | dict(fixed)
        if one not in found:
            found.append(one)
    return found


def ladder(lengths: Sequence[int]) -> list[int]:
    """The lengths asked for, and powers of two below the longest: where the break-even is looked for."""
    found, size = set(lengths), _SHORTEST
    while size < max(lengths):
        found.add(size)
        size *= 2
    return sorted(found)


@torch.no_grad()
def choose(number: int, name: str, seen: Captured, wish: Wish) -> Choice:
    """Choose the settings of one layer, or leave it exact with a reason.

    Args:
        number: Place among the attention modules.
        name: Name of the module.
        seen: Its queries, keys and values, at least as many as the longest length.
        wish: What is asked.
    """
    choice = Choice(number, Layer(name, "exact"))
    longest = max(wish.lengths)
    if seen.window is not None:
        reason = f"attends within a window of {seen.window} keys, which exact attention does at that cost already"
        choice.layer = Layer(name, "exact", reason=reason)
        return choice
    if seen.causal and not ATTENTION.info(wish.method).facts["causal"]:
        choice.layer = Layer(name, "exact", reason=f"{wish.method} has no causal form")
        return choice
    if seen.causal and wish.fixed_state:
        reason = f"the causal form of {wish.method} works out its directions chunk by chunk, so they cannot be fixed"
        choice.layer = Layer(name, "exact", reason=reason)
        return choice
    if wish.max_error == 0:
        choice.layer = Layer(name, "exact", reason="no error is allowed")
        return choice
    tried = [
        one for one in candidates(wish.method, wish.fixed, seen.causal) if _chunk(wish.method, one, seen) < longest
    ]
    if not tried:
        reason = f"causal chunks are exact, and longer than {longest} keys; method.chunk makes them shorter"
        choice.layer = Layer(name, "exact", reason=reason)
        return choice
    q, k, v, call = seen.at(longest)
    rows = _pilots(longest, wish.seed, q.device)
    truth = exact.attend(q, k, v, call)[0][:, :, rows]
    mean = v.mean(2, keepdim=True).repeat_interleave(q.shape[1] // v.shape[1], 1).expand_as(truth)
    choice.mean_error = worst_head(mean, truth)
    trial = None
    state = fix(wish.method, q, k, v) if wish.fixed_state else None
    for settings in tried:
        trial = Trial(settings)
        choice.trials.append(trial)
        layer = Layer(name, wish.method, settings, 0, wish.seed, state)
        trial.error[longest] = worst_head(layer.attend(q, k, v, call)[:, :, rows], truth)
        trial.ratio[longest] = speed(layer, q, k, v, call)
        if trial.error[longest] <= wish.max_error:
            break
    assert trial is not None
    if trial.error[longest] > wish.max_error:
        least = min(one.error[longest] for one in choice.trials)
        reason = f"error {least:.3f} at {longest} keys at best, allowed {wish.max_error:g}"
        choice.layer = Layer(name, "exact", reason=reason)
        return choice
    choice.layer = _from_where(Layer(name, wish.method, trial.settings, 0, wish.seed, state), trial, seen, wish)
    return choice


def _chunk(method: str, settings: Mapping[str, Any], seen: Captured) -> int:
    """Keys within which these settings are exact, because attention is causal; 0 where they approximate all."""
    return int(getattr(ATTENTION.build_config(method, dict(settings)), "chunk", 0)) if seen.causal else 0


def _from_where(layer: Layer, trial: Trial, seen: Captured, wish: Wish) -> Layer:
    """Measure the other lengths, and say from which on the settings are used."""
    first: int | None = None
    why = ""
    for length in reversed(ladder(wish.lengths)):
        if wish.min_length is not None and length < wish.min_length and length not in wish.lengths:
            continue
        _measure(trial, layer, seen, length, wish.seed)
    for length in sorted(trial.error, reverse=True):
        if wish.min_length is not None and length < wish.min_length:
            break
        if trial.error[length] > wish.max_error:
            why = f"error {trial.error[length]:.3f} at {length} keys, allowed {wish.max_error:g}"
            break
        if wish.min_length is None and trial.ratio[length] < PAYS:
            why = f"{trial.ratio[length]:.2f} times the speed of exact attention at {length} keys"
            break
        first = length
    if wish.min_length is not None and not why:
        first = wish.min_length
    if first is None:
        return Layer(layer.name, "exact", reason=why)
    first = max(first, FEWEST_QUERIES)
    if wish.limit is not None and first > wish.limit:
        return Layer(layer.name, "exact", reason=f"pays from {first} keys on, and the model takes {wish.limit}")
    return replace(layer, min_length=first)


def _measure(trial: Trial, layer: Layer, seen: Captured, length: int, seed: int) -> None:
    if length in trial.error:
        return
    q, k, v, call = seen.at(length)
    rows = _pilots(length, seed, q.device)
    truth = exact.attend(q, k, v, call)[0][:, :, rows]
    trial.error[length] = worst_head(layer.attend(q, k, v, call)[:, :, rows], truth)
    trial.ratio[length] = speed(layer, q, k, v, call)


def _pilots(length: int, seed: int, device: torch.device) -> Tensor:
    """Numbers of the pilot rows: drawn, so that they are not those that shape the operator's own weights."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    return order[:_ROWS].to(device)


def worst_head(found: Tensor, truth: Tensor) -> float:
    """Largest over the heads of |found - truth|_2 / |truth|_2 (spectral norms), from [1, H, rows, dv] each."""
    norm = torch.linalg.matrix_norm(truth.float(), ord=2).clamp_min(1e-12)
    return float((torch.linalg.matrix_norm((found - truth).float(), ord=2) / norm).max())


def speed(layer: Layer, q: Tensor, k: Tensor, v: Tensor, call: Call) -> float:
    """Time of torch's SDPA divided by that of the operator, called in turn."""

    def fused() -> None:
        heads = q.shape[1]
        functional.scaled_dot_product_attention(
            q, repeat_heads(k, heads), repeat_heads(v, heads), scale=call.scale, is_causal=call.causal
        )

    def operator() -> None:
        layer.attend(q, k, v, call)

    sides = (fused, operator)
    least = [float("inf")] * 2
    began = time.perf_counter()
    for turn in range(_TURNS + 1):
        taken = [_timed(run, q.is_cuda) for run in sides]
        late = time.perf_counter() - began > _PATIENCE
        if turn or late:  # the first fills caches, which long calls do not notice
            least = [min(pair) for pair in zip(least, taken, strict=True)]
        if late:
            break
    return least[0] / least[1]


def _timed(run: Callable[[], None], cuda: bool) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
