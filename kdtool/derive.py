"""A student out of the teacher's own layers."""

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kdtool.errors import ModelProblem, UsageProblem
from kdtool.modeling.compressed import CompressedConfig
from kdtool.models import Loaded
from kdtool.patching import KEY

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "depth")


def layer_indices(spec: str, depth: int) -> list[int]:
    """Layers that `layers:N` or `layers:0,3,5` names in a model of `depth` layers.

    `layers:N` takes evenly spaced layers that end with the last: layer (i+1)*depth//N - 1.

    Raises:
        UsageProblem: not of that form, out of range, or not rising.
    """
    text = spec.removeprefix("layers:")
    if re.fullmatch(r"\d+", text):
        count = int(text)
        if not 1 <= count <= depth:
            raise UsageProblem(f"--student {spec}: the teacher has {depth} layers", hint=f"layers:1 to layers:{depth}")
        return [(i + 1) * depth // count - 1 for i in range(count)]
    if re.fullmatch(r"\d+(,\d+)*,?", text):
        chosen = [int(part) for part in text.strip(",").split(",")]
        if chosen != sorted(set(chosen)) or chosen[-1] >= depth:
            raise UsageProblem(
                f"--student {spec}: layers must rise and be below {depth}",
                hint=f"the teacher has layers 0 to {depth - 1}",
            )
        return chosen
    raise UsageProblem(
        f"--student {spec}: not of the form layers:N or layers:0,3,5", hint="a single layer i is written layers:i,"
    )


def _place(config: Any) -> tuple[Any, str]:
    """The (sub-)configuration that states the number of layers, and its key.

    Raises:
        ModelProblem: none does.
    """
    for candidate in (config, getattr(config, "backbone_config", None)):
        for key in _COUNTS:
            if candidate is not None and isinstance(getattr(candidate, key, None), int):
                return candidate, key
    raise ModelProblem("the teacher does not state a number of layers", hint="give a student folder or configuration")


def depth_of(config: Any, model: nn.Module) -> tuple[int, str]:
    """Number of layers, and the path of the module list that holds them.

    Raises:
        ModelProblem: the architecture has no single stack of layers.
    """
    holder, key = _place(config)
    depth = int(getattr(holder, key))
    return depth, _stack(model, depth)


def _stack(model: nn.Module, depth: int) -> str:
    """Path of the one module list that holds the layers."""
    found = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found if other != name)]
    if len(outer) > 1:
        # audio models start with convolutions, which may be as many as the layers but are not alike
        outer = [name for name in outer if _alike(model.get_submodule(name))]
    if len(outer) != 1:
        raise ModelProblem(
            f"layers:... needs one stack of {depth} layers in the teacher, found {len(outer)}",
            hint="give a student folder or configuration",
        )
    return str(outer[0])


def _alike(layers: nn.Module) -> bool:
    """Whether all layers of a list have parameters of the same names and shapes."""
    shapes = [[(name, p.shape) for name, p in layer.named_parameters()] for layer in layers.children()]
    return all(shape == shapes[0] for shape in shapes)


def keep_layers(model: Any, spec: str) -> tuple[Any, dict[str, str], list[int]]:
    """What a model with only some of its layers is made of.

    Args:
        model: Any model whose layers stand in one module list; its weights are not looked at.
        spec: `layers:N` or `layers:0,3,5`.

    Returns:
        Its configuration, the old name of each of its weights to the new one, and the layers kept.

    Raises:
        UsageProblem: the specification does not fit.
        ModelProblem: the architecture has no single stack of layers.
    """
    config = copy.deepcopy(model.config)
    depth, stack = depth_of(config, model)
    holder, key = _place(config)
    chosen = layer_indices(spec, depth)
    setattr(holder, key, len(chosen))
    vars(config).pop(KEY, None)  # it names layers of the teacher; the copy starts with exact attention
    for name, value in list(vars(holder).items()):
        # per-layer lists, such as layer_types of alternating attention
        if isinstance(value, list) and len(value) == depth and name.startswith("layer"):
            setattr(holder, name, [value[i] for i in chosen])
    numbers = {old: new for new, old in enumerate(chosen)}
    names = _renumbered(model.state_dict(), stack, numbers)
    if isinstance(config, CompressedConfig):
        inside = _renumbered(config.forms, stack.removeprefix(f"{model.base_model_prefix}."), numbers)
        config.forms = {new: config.forms[old] for old, new in inside.items()}
    return config, names, chosen


def _renumbered(names: Iterable[str], stack: str, numbers: Mapping[int, int]) -> dict[str, str]:
    """Old names to new ones, without those of layers that are not kept."""
    pattern = re.compile(rf"^{re.escape(stack)}\.(\d+)\.")
    found = {}
    for name in names:
        match = pattern.match(name)
        if match is None:
            found[name] = name
        elif int(match[1]) in numbers:
            found[name] = f"{stack}.{numbers[int(match[1])]}.{name[match.end() :]}"
    return found


def from_layers(teacher: Loaded, spec: str) -> Loaded:
    """A copy of the teacher that keeps only some of its layers, with their weights.

    Args:
        teacher: Any model whose layers stand in one module list.
        spec: `layers:N` or `layers:0,3,5`.

    Raises:
        UsageProblem: the specification does not fit.
        ModelProblem: the architecture has no single stack of layers.
    """
    config, names, chosen = keep_layers(teacher.model, spec)
    with torch.random.fork_rng():
        student: Any = type(teacher.model)(config)
    state = teacher.model.state_dict()
    student.load_state_dict({new: state[old] for old, new in names.items()})
    facts = {"new_weights": [], "dtype": teacher.facts.get("dtype", "float32"), "layers": chosen}
    return Loaded(student.eval(), teacher.processor, spec, None, None, facts)
