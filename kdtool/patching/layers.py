"""The attention modules of a model: finding and numbering them, patching them, and seeing that it took."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdtool.errors import ModelProblem, UsageProblem, nearest
from kdtool.patching import interface, modules
from kdtool.patching.interface import Layer, Seen, layer_of, set_layer

_BIASED = {
    "MPNetSelfAttention": "a learned position bias is added to all logits",
    "DisentangledSelfAttention": "biases of relative positions are added to all logits",
    "WavLMAttention": "a gated position bias is added to all logits",
}
"""Classes that do not use transformers' attention interface, and why they could not be approximated if they did."""

_OUTSIDE = "its code does not go through transformers' attention interface"
_SAME = 1e-5
"""Largest difference of an output with exact attention through the interface, relative to the largest output."""


@dataclass(slots=True)
class Site:
    """One attention module.

    Attributes:
        number: Its place among the attention modules of the model.
        name: Its name, as seen from the body of the model.
        module: The module.
        reason: Why it cannot be patched; None if it can.
        calls: Calls in one forward pass.
    """

    number: int
    name: str
    module: nn.Module
    reason: str | None = None
    calls: list[Seen] = field(default_factory=list)


def body_of(model: nn.Module) -> nn.Module:
    """The model without its head; the model itself where it has no such part."""
    prefix = getattr(model, "base_model_prefix", "")
    inner = getattr(model, prefix, None) if prefix else None
    return inner if isinstance(inner, nn.Module) else model


def names_of(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name, as seen from the body; what lies outside it under its full name, which starts with a dot."""
    body = body_of(model)
    names = {name: module for name, module in body.named_modules() if name}
    if body is not model:
        inside = {id(module) for module in body.modules()}
        names |= {f".{name}": module for name, module in model.named_modules() if name and id(module) not in inside}
    return names


def switch(model: nn.Module, implementation: str) -> None:
    """Choose the attention implementation of a model and all models within.

    Raises:
        ModelProblem: transformers refuses.
    """
    setter: Any = getattr(model, "set_attn_implementation", None)
    if setter is None:
        return
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of models off the interface; those are found by counting calls
    try:
        setter(implementation)
    except (ValueError, ImportError) as error:
        raise ModelProblem(
            "the model does not let its attention be replaced", why=str(error).split("\n", 1)[0][:300]
        ) from None
    finally:
        logger.setLevel(level)


def implementation_of(model: nn.Module) -> str:
    """Name of the attention implementation of a model."""
    config: Any = getattr(model, "config", None)
    return str(getattr(config, "_attn_implementation", None) or "sdpa")


@contextlib.contextmanager
def through_interface(model: nn.Module) -> Iterator[None]:
    """The interface without any patch, as long as the context lasts."""
    before = implementation_of(model)
    kept = {module: layer for module in model.modules() if (layer := layer_of(module)) is not None}
    for module in kept:
        set_layer(module, None)
    switch(model, interface.NAME)
    try:
        yield
    finally:
        for module, layer in kept.items():
            set_layer(module, layer)
        if before != interface.NAME:
            switch(model, before)


@torch.no_grad()
def find_sites(model: nn.Module, run: Callable[[], Tensor], pattern: str | None = None) -> list[Site]:
    """The attention modules that a forward pass meets, in the order of the model.

    Args:
        model: A model in eval mode, not patched.
        run: One forward pass on real inputs, with padding where the model takes it; gives its output.
        pattern: Names of modules with fused projections (`qkv`, `proj`, `num_heads`) to take in, as `blocks.*.attn`.

    Raises:
        ModelProblem: no attention at all, or the model gives other outputs through the interface even with
            exact attention, so that something (a mask) gets lost on the way.
    """
    before = run()
    if pattern is not None:
        modules.wrap(model, pattern)
    calls: dict[int, list[Seen]] = {}
    with through_interface(model), interface.watching(lambda seen: calls.setdefault(id(seen.module), []).append(seen)):
        after = run()
    difference = float((after - before).abs().max())
    if not difference <= _SAME * max(1.0, float(before.abs().max())):
        raise ModelProblem(
            "the attention of this model cannot be replaced",
            why=f"even exact attention changes its outputs by {difference:.2e} when called through the interface",
        )
    sites: list[Site] = []
    for name, module in names_of(model).items():
        if id(module) in calls:
            sites.append(Site(len(sites), name, module, _reason(calls[id(module)]), calls[id(module)]))
        elif _is_attention(module) and not any(id(inner) in calls for inner in module.modules()):
            sites.append(Site(len(sites), name, module, _BIASED.get(type(module).__name__, _OUTSIDE)))
    if not sites:
        raise ModelProblem(
            "the model has no attention to patch", hint="--module-pattern names modules with qkv and proj"
        )
    return sites


def _reason(calls: Sequence[Seen]) -> str | None:
    """Why all calls of a module must be exact; None if one need not."""
    reasons = [seen.reason for seen in calls]
    return None if None in reasons else reasons[0]


def _is_attention(module: nn.Module) -> bool:
    """A module that by its name computes attention, and holds no other such module."""

    def named(one: nn.Module) -> bool:
        return re.search(r"Attention\w*$", type(one).__name__) is not None

    inner = [one for one in module.modules() if one is not module]
    has_weights = any(isinstance(one, nn.Linear) for one in inner)
    return named(module) and has_weights and not any(named(one) for one in inner)


def parse_layers(text: str | None, count: int) -> list[int]:
    """Numbers that `0-3,7` names; all without a text.

    Raises:
        UsageProblem: not of that form, or there are fewer layers.
    """
    if text is None or text.strip() == "all":
        return list(range(count))
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise UsageProblem(f"--layers {text}: not of the form 0-3,7")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise UsageProblem(f"--layers {text}: {first}-{last} runs backwards", hint=f"--layers {last}-{first}")
        if last >= count:
            raise UsageProblem(
                f"--layers {text}: there is no layer {last}", hint=f"the model has attention layers 0 to {count - 1}"
            )
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def install(model: nn.Module, layers: Sequence[Layer], pattern: str | None = None) -> None:
    """Patch a model in place.

    Args:
        model: The model.
        layers: What to do in which module, by name; modules that are not named stay exact.
        pattern: Modules with fused projections to take in; see `find_sites`.

    Raises:
        ModelProblem: a name is not a module of the model, or the model keeps its own attention.
    """
    if pattern is not None:
        modules.wrap(model, pattern)
    names = names_of(model)
    for layer in layers:
        module = names.get(layer.name)
        if module is None:
            raise ModelProblem(
                f"the model has no attention module '{layer.name}'", hint=nearest(layer.name.lstrip("."), names)
            )
        set_layer(module, layer)
    switch(model, interface.NAME)
    for layer in layers:
        config: Any = getattr(names[layer.name], "config", None)
        used = getattr(config, "_attn_implementation", interface.NAME)
        if layer.reason is None and used != interface.NAME and not modules.is_wrapped(names[layer.name]):
            raise ModelProblem(f"attention module '{layer.name}' keeps its own implementation", why=str(used))


def remove(model: nn.Module, implementation: str = "sdpa") -> None:
    """Take all patches away; the model is the exact one again."""
    for module in model.modules():
        set_layer(module, None)
    switch(model, implementation)


@dataclass(slots=True)
class Count:
    """Calls of the attention function in some forward passes: approximate ones and all of them."""

    approximate: int = 0
    total: int = 0


@contextlib.contextmanager
def counting() -> Iterator[Count]:
    """Count calls of the attention function while the context lasts."""
    count = Count()

    def note(seen: Seen) -> None:
        count.total += 1
        count.approximate += seen.approximate

    with interface.watching(note):
        yield count


@torch.no_grad()
def check_called(model: nn.Module, run: Callable[[], Any]) -> Count:
    """Run once, and see that every patched module called the attention function.

    Returns:
        How many calls there were.

    Raises:
        ModelProblem: a module that claims to be patched did not call.
    """
    called: set[int] = set()
    count = Count()

    def note(seen: Seen) -> None:
        called.add(id(seen.module))
        count.total += 1
        count.approximate += seen.approximate

    with interface.watching(note):
        run()
    for name, module in names_of(model).items():
        layer = layer_of(module)
        if layer is not None and layer.reason is None and id(module) not in called:
            raise ModelProblem(
                f"attention module '{name}' is patched, but a forward pass never asked it for attention",
                why="its class computes attention by itself",
                hint="leave it out with --layers",
            )
    return count
