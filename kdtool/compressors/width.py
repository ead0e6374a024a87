"""Keep the neurons, heads and hidden channels that matter most: by activation on data, else by weight."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kdtool.compressors import _heads
from kdtool.compressors._base import (
    Context,
    Linear,
    Made,
    body_config,
    known,
    layers_of,
    linears,
    matrix_of,
    rebuilt,
    reformed,
    run_over,
    skeleton,
    watching,
)
from kdtool.compressors._heads import Cut
from kdtool.errors import ModelProblem
from kdtool.lazy import held
from kdtool.modeling.compressed import CompressedModel
from kdtool.modeling.linear_forms import shape_of
from kdtool.models import Loaded

paper = "Muralidharan et al.: Compact Language Models via Pruning and Knowledge Distillation, 2024, arXiv:2407.14679"
dials = {"ffn": 0.03, "heads": 0.03, "hidden": 0.03}

_INNER = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim")
_WIDTH = ("hidden_size", "n_embd", "d_model", "dim")


@dataclass(frozen=True)
class Config:
    """Settings."""

    ffn: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the feed-forward neurons to keep, above 0 and at most 1."""
    heads: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the attention heads to keep."""
    hidden: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the channels between the layers to keep."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """Where a configuration states widths.

    Attributes:
        values: The configuration of the transformer itself, to be changed.
        width_key: Name of the number of channels.
        width: That number.
        inner_key: Name of the number of neurons; None where it is four times the channels.
        inner: That number.
    """

    values: Any
    width_key: str
    width: int
    inner_key: str | None
    inner: int


def _shape(config: Any) -> _Shape:
    """Raises ModelProblem where there is no such number."""
    values = body_config(config)
    stated = {names: next((n for n in names if isinstance(getattr(values, n, None), int)), None) for names in _KEYS}
    width_key, inner_key = stated[_WIDTH], stated[_INNER]
    if width_key is None:
        raise ModelProblem("width: the configuration does not state a hidden size")
    width = int(getattr(values, width_key))
    return _Shape(values, width_key, width, inner_key, int(getattr(values, inner_key)) if inner_key else 4 * width)


_KEYS = (_WIDTH, _INNER)


def _share(share: float, size: int) -> int:
    return max(1, round(share * size))


def _feed_forward(layer: nn.Module, shape: _Shape) -> tuple[list[str], str]:
    """The paths of the maps into the neurons, and of the one out of them.

    Raises:
        ModelProblem: the layer has no such maps, or they cannot be told from others.
    """
    found = linears(layer)
    into = [name for name, module in found.items() if shape_of(module) == (shape.width, shape.inner)]
    out = [name for name, module in found.items() if shape_of(module) == (shape.inner, shape.width)]
    if shape.width == shape.inner or len(out) != 1 or not 1 <= len(into) <= 2:
        raise ModelProblem("width: the feed-forward maps of this architecture cannot be told from the others")
    return into, out[0]


def _scores(loaded: Loaded, modules: Mapping[str, Linear], context: Context) -> dict[str, Tensor]:
    """Score of each input of the modules: how much of their output it makes.

    On data it is the root mean square of the activation times the norm of its outgoing weights, without
    data the norm alone.
    """
    norms = {name: matrix_of(m, m.weight.detach()).double().norm(dim=0) for name, m in modules.items()}
    if context.batches is None:
        return norms
    squares: dict[str, Tensor] = {}

    def note(name: str, inputs: Tensor) -> None:
        squares[name] = squares.get(name, torch.zeros(())) + inputs.double().square().sum(0)

    with watching(modules, note):
        run_over(loaded.model, context)
    return {name: norms[name] * squares[name].sqrt() for name in modules if name in squares}


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the largest scores, rising; of ties the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _channel_scores(width: int, scores: Mapping[str, Tensor]) -> Tensor:
    """Score of each channel between the layers: its share of what each map that reads them makes, added up."""
    total = torch.zeros(width, dtype=torch.float64)
    for found in scores.values():
        if len(found) == width:
            total += found.square() / found.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return total


def _neuron_cuts(loaded: Loaded, shape: _Shape, count: int, scores: Mapping[str, Tensor]) -> dict[str, Cut]:
    """Cuts of the feed-forward maps."""
    path, layers = layers_of(loaded)
    cuts: dict[str, Cut] = {}
    for i, layer in enumerate(layers):
        into, out = _feed_forward(layer, shape)
        keep = best(scores[f"{path}.{i}.{out}"], count)
        cuts[f"{path}.{i}.{out}"] = Cut(columns=keep)
        cuts |= {f"{path}.{i}.{name}": Cut(rows=keep) for name in into}
    return cuts


def _cut_tensor(
    name: str, tensor: Tensor, cut: Cut | None, turned: bool, wanted: tuple[int, ...], channels: Tensor
) -> Tensor:
    """A weight with what is kept of it.

    Raises:
        ModelProblem: a dimension shrinks for a reason that is not known.
    """
    rows, columns = (None, None) if cut is None else (cut.rows, cut.columns)
    axes = [rows] if tensor.ndim == 1 else [columns, rows] if turned else [rows, columns]
    for axis in range(tensor.ndim):
        keep = axes[axis] if axis < len(axes) else None
        if keep is not None:
            tensor = tensor.index_select(axis, keep)
        elif tensor.shape[axis] != wanted[axis] and wanted[axis] == len(channels):
            tensor = tensor.index_select(axis, channels)
    if tuple(tensor.shape) != wanted:
        raise ModelProblem(f"width: '{name}' cannot be cut", why=f"{tuple(tensor.shape)} where {wanted} is asked for")
    return tensor.clone()


def compress(loaded: Loaded, config: Config, context: Context) -> Loaded:
    """The model with fewer neurons, heads and channels, equally many in each layer.

    Raises:
        ModelProblem: the architecture's parts cannot be told apart, or it computes with other shapes.
    """
    if isinstance(loaded.model, CompressedModel):
        raise ModelProblem(f"width: '{loaded.ref}' is compressed already", hint="width comes before other stages")
    changed: Any = copy.deepcopy(loaded.model.config)
    shape = _shape(changed)
    scores: dict[str, Tensor] = known(context, "width", loaded, lambda: _scores(loaded, linears(loaded.model), context))
    cuts: dict[str, Cut] = {}
    count = _share(config.ffn, shape.inner)
    if count < shape.inner:
        cuts |= _neuron_cuts(loaded, shape, count, scores)
        setattr(shape.values, shape.inner_key or "n_inner", count)
    elif shape.inner_key is None:
        shape.values.n_inner = shape.inner  # else it would follow the channels
    channels = torch.arange(shape.width)
    forms: dict[str, dict[str, Any]] = {}
    if config.heads < 1.0 or config.hidden < 1.0:
        heads = _heads.heads_of(loaded, shape.values, shape.width, context)
        kept_width = heads.fitting_width(_share(config.hidden, shape.width))
        channels = best(_channel_scores(shape.width, scores), kept_width)
        more, forms = heads.cut(lambda size: _share(config.heads, size), scores, kept_width)
        cuts |= more
        setattr(shape.values, shape.width_key, kept_width)
        if getattr(shape.values, "embedding_size", None) == shape.width:
            shape.values.embedding_size = kept_width  # ELECTRA's, which without it would be mapped up again
    return _assemble(loaded, changed, cuts, forms, channels, context)


def _assemble(
    loaded: Loaded,
    changed: Any,
    cuts: Mapping[str, Cut],
    forms: Mapping[str, Mapping[str, Any]],
    channels: Tensor,
    context: Context,
) -> Loaded:
    """The smaller model, its shapes taken from an empty one."""
    prefix = ""
    if forms:
        changed, prefix = reformed(loaded, changed, forms, context)
    try:
        empty = skeleton(loaded, changed, context)
    except (ValueError, RuntimeError) as error:
        raise ModelProblem(f"width: '{loaded.ref}' cannot be cut this way", why=str(error).split("\n", 1)[0]) from None
    wanted = {name: tuple(value.shape) for name, value in empty.state_dict().items()}
    state: dict[str, Tensor] = {}
    for name, tensor in loaded.model.state_dict().items():
        path = name.rpartition(".")[0]
        turned = path in cuts and isinstance(loaded.model.get_submodule(path), Conv1D)
        if prefix + name not in wanted:
            raise ModelProblem(f"width: '{loaded.ref}' cannot be cut this way", why=f"{name} has no place")
        state[prefix + name] = _cut_tensor(name, tensor, cuts.get(path), turned, wanted[prefix + name], channels)
    return rebuilt(loaded, Made(changed, held(state), {"shapes": _stated(changed)}), context)


def _stated(config: Any) -> dict[str, int]:
    """Widths that a configuration states, for the report."""
    values = body_config(config)
    names = (*_WIDTH, *_INNER, "num_attention_heads", "num_key_value_heads", "n_head", "n_heads")
    return {name: getattr(values, name) for name in names if isinstance(getattr(values, name, None), int)}
