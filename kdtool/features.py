"""Activations inside a model, taken by hooks, so that models stay untouched.

A tap is named by a module path (`resnet.encoder.stages.2`), by the number of a stage or layer
(`0`, `-1`), or `pooled`, the vector that reaches the classifier head. `pre:` before a path or number
means what enters the last ReLU in there, or its output where it has none.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kdtool.errors import ConfigProblem, ModelProblem, nearest

POOLED = "pooled"
PRE = "pre:"


def stages_of(model: nn.Module) -> list[str]:
    """Paths of a model's stages or layers, in order.

    These are the members of the outermost module list or sequence of like members that holds the
    most parameters: the stages of a CNN, the layers of a transformer.

    Raises:
        ModelProblem: there is no such list.
    """
    declared = getattr(model, "stage_paths", None)
    if declared is not None:
        return list(declared)
    found: dict[str, nn.ModuleList | nn.Sequential] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        fewest = 1 if isinstance(module, nn.ModuleList) else 2
        like = len({type(child) for child in module}) == 1 and len(module) >= fewest
        inside = any(path.startswith(f"{other}.") for other in found)
        if like and not inside and not isinstance(module[0], nn.Linear | nn.Conv2d):
            found[path] = module
    if not found:
        raise ModelProblem("this model has no list of stages or layers", hint="name the modules by their paths")
    best = max(found, key=lambda path: sum(p.numel() for p in found[path].parameters()))
    return [f"{best}.{i}" for i in range(len(found[best]))]


def head_of(model: nn.Module, classes: int) -> tuple[str, nn.Linear]:
    """Path and module of the linear layer that gives the logits.

    Raises:
        ModelProblem: no linear layer has that many outputs.
    """
    heads = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not heads:
        raise ModelProblem("this model has no linear classifier head")
    return heads[-1]


def resolve_tap(model: nn.Module, point: str) -> str:
    """Module path of a tap other than `pooled`.

    Raises:
        ConfigProblem: no such stage or module; names the nearest.
    """
    if point.lstrip("-").isdigit():
        stages = stages_of(model)
        number = int(point)
        if not -len(stages) <= number < len(stages):
            raise ConfigProblem(f"tap {point}: the model has stages 0 to {len(stages) - 1}")
        return stages[number]
    paths = dict(model.named_modules())
    if point not in paths:
        raise ConfigProblem(f"tap '{point}': the model has no such module", hint=nearest(point, paths))
    return point


def last_relu(model: nn.Module, point: str) -> nn.Module | None:
    """The last ReLU inside what a tap names, None where there is none.

    Raises:
        ConfigProblem: no such stage or module.
    """
    inside = model.get_submodule(resolve_tap(model, point)).modules()
    return next((module for module in reversed(list(inside)) if isinstance(module, nn.ReLU)), None)


@contextmanager
def taps(model: nn.Module, points: Sequence[str], classes: int) -> Iterator[dict[str, Tensor]]:
    """Collect activations during forward passes inside the block.

    Args:
        model: The model to listen to.
        points: Names of taps.
        classes: Number of outputs of the head, to find it for `pooled`.

    Yields:
        A mapping that holds, after a forward pass, the tensor of each tap.
    """
    values: dict[str, Tensor] = {}
    handles: list[Any] = []

    def keep(name: str, value: Any) -> None:
        values[name] = value[0] if isinstance(value, tuple | list) else value

    for point in points:
        if point == POOLED:
            _, head = head_of(model, classes)
            handles.append(head.register_forward_pre_hook(lambda _, args, name=point: keep(name, args[0])))
            continue
        relu = last_relu(model, point.removeprefix(PRE)) if point.startswith(PRE) else None
        if relu is not None:
            handles.append(relu.register_forward_pre_hook(lambda m, args, name=point: keep(name, _kept(m, args[0]))))
        else:
            module = model.get_submodule(resolve_tap(model, point.removeprefix(PRE)))
            handles.append(module.register_forward_hook(lambda _, _args, out, name=point: keep(name, _first(out))))
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


def _kept(relu: Any, value: Tensor) -> Tensor:
    """What enters a ReLU, safe from one that works in place."""
    return value.clone() if relu.inplace else value


def _first(output: Any) -> Any:
    """The main tensor of a module's output."""
    if isinstance(output, Tensor):
        return output
    return next(
        value for value in (output.values() if hasattr(output, "values") else output) if isinstance(value, Tensor)
    )


def as_map(value: Tensor) -> Tensor:
    """An activation as a map [batch, channels, height, width].

    Token sequences [batch, tokens, width] of images become their grid, without a class token;
    other sequences become maps of width 1; vectors become maps of size 1.
    """
    if value.ndim == 4:
        return value
    if value.ndim == 2:
        return value[:, :, None, None]
    tokens = value.shape[1]
    side = math.isqrt(tokens - 1)
    if side * side == tokens - 1 and side > 1:
        value, tokens = value[:, 1:], tokens - 1
    side = math.isqrt(tokens)
    height, width = (side, side) if side * side == tokens else (tokens, 1)
    return value.transpose(1, 2).reshape(value.shape[0], value.shape[2], height, width)


def as_vector(value: Tensor) -> Tensor:
    """An activation as one vector per example [batch, channels]: means over positions."""
    if value.ndim == 2:
        return value
    return value.flatten(2).mean(-1) if value.ndim == 4 else value.mean(1)
