"""Keep the feed-forward neurons and the attention heads that matter most: by activation on data, else by weight."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kdtool.compressors._base import (
    Context,
    Linear,
    body_config,
    layers_of,
    linears,
    rebuilt,
    run_over,
    shape_of,
    watching,
)
from kdtool.errors import ModelProblem, UsageProblem
from kdtool.models import Loaded

paper = "Muralidharan et al.: Compact Language Models via Pruning and Knowledge Distillation, 2024, arXiv:2407.14679"

_INNER = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim")
_WIDTH = ("hidden_size", "n_embd", "d_model", "dim")


@dataclass(frozen=True)
class Config:
    """Settings."""

    ffn: float = 0.5
    """Share of the feed-forward neurons to keep, above 0 and at most 1."""
    heads: float = 1.0
    """Share of the attention heads to keep; below 1 only where a configuration states the size of a head."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """What is kept of one linear map: indices of outputs, of inputs; None for all."""

    rows: Tensor | None = None
    columns: Tensor | None = None


def _stated(config: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(getattr(config, name, None), int)), None)


def _share(name: str, share: float, size: int) -> int:
    if not 0.0 < share <= 1.0:
        raise UsageProblem(f"width: {name}={share:g} is no share", hint="above 0 and at most 1")
    return max(1, round(share * size))


def _matrix(module: Linear) -> Tensor:
    """Weights [outputs, inputs]."""
    weight: Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def _feed_forward(layer: nn.Module, width: int, inner: int) -> tuple[dict[str, Linear], str]:
    """The maps into the neurons by path, and the path of the one out of them.

    Raises:
        ModelProblem: the layer has no such maps, or they cannot be told from others.
    """
    found = linears(layer)
    into = {name: module for name, module in found.items() if shape_of(module) == (width, inner)}
    out = [name for name, module in found.items() if shape_of(module) == (inner, width)]
    if width == inner or len(out) != 1 or not 1 <= len(into) <= 2:
        raise ModelProblem("width: the feed-forward maps of this architecture cannot be told from the others")
    return into, out[0]


def _importance(loaded: Loaded, modules: Mapping[str, Linear], context: Context) -> dict[str, Tensor]:
    """Score of each input of the modules: how much of their output it makes.

    On data it is the root mean square of the activation times the norm of its outgoing weights, without
    data the norm alone.
    """
    norms = {name: _matrix(module).double().norm(dim=0) for name, module in modules.items()}
    if context.batches is None:
        return norms
    squares: dict[str, Tensor] = {}

    def note(name: str, inputs: Tensor) -> None:
        squares[name] = squares.get(name, torch.zeros(())) + inputs.double().square().sum(0)

    with watching(modules, note):
        run_over(loaded.model, context)
    return {name: norms[name] * squares[name].sqrt() for name in modules}


def _ffn_cuts(loaded: Loaded, config: Config, values: Any, context: Context) -> tuple[dict[str, _Cut], dict[str, int]]:
    """Cuts of the feed-forward maps, and the configuration that states them."""
    path, layers = layers_of(loaded)
    width_key, inner_key = _stated(values, _WIDTH), _stated(values, _INNER)
    if width_key is None:
        raise ModelProblem("width: the configuration does not state a hidden size")
    width = int(getattr(values, width_key))
    inner = int(getattr(values, inner_key)) if inner_key else 4 * width
    count = _share("ffn", config.ffn, inner)
    if count == inner:
        return {}, {}
    parts = [_feed_forward(layer, width, inner) for layer in layers]
    out = {f"{path}.{i}.{name}": linears(layers[i])[name] for i, (_, name) in enumerate(parts)}
    scores = _importance(loaded, out, context)
    cuts: dict[str, _Cut] = {}
    for i, (into, name) in enumerate(parts):
        key = f"{path}.{i}.{name}"
        keep = scores[key].argsort(descending=True, stable=True)[:count].sort().values
        cuts[key] = _Cut(columns=keep)
        cuts |= {f"{path}.{i}.{other}": _Cut(rows=keep) for other in into}
    return cuts, {inner_key or "n_inner": count}


def _positions(heads: Tensor, size: int) -> Tensor:
    """Indices of the dimensions of heads."""
    return (heads.unsqueeze(1) * size + torch.arange(size)).reshape(-1)


def _head_cuts(loaded: Loaded, config: Config, values: Any, context: Context) -> tuple[dict[str, _Cut], dict[str, int]]:
    """Cuts of the attention maps: whole groups of heads that share keys, or with one group heads out of it."""
    if config.heads == 1.0:
        return {}, {}
    path, layers = layers_of(loaded)
    found = [{name.rsplit(".", 1)[-1]: name for name in linears(layer)} for layer in layers]
    size = getattr(values, "head_dim", None)
    if size is None or not all({"q_proj", "k_proj", "v_proj", "o_proj"} <= set(names) for names in found):
        raise ModelProblem(
            f"width: '{loaded.ref}' cannot lose heads",
            why="its configuration does not state the size of a head, so fewer heads would be larger ones",
            hint="heads=1 cuts feed-forward neurons only",
        )
    heads = int(values.num_attention_heads)
    groups = int(getattr(values, "num_key_value_heads", None) or heads)
    each = heads // groups
    kept_groups = _share("heads", config.heads, groups) if groups > 1 else 1
    kept_each = each if groups > 1 else _share("heads", config.heads, each)
    out = {f"{path}.{i}.{names['o_proj']}": linears(layers[i])[names["o_proj"]] for i, names in enumerate(found)}
    scores = _importance(loaded, out, context)
    cuts: dict[str, _Cut] = {}
    for i, names in enumerate(found):
        of_heads = scores[f"{path}.{i}.{names['o_proj']}"].reshape(groups, each, size).square().sum(2)
        chosen = of_heads.sum(1).argsort(descending=True, stable=True)[:kept_groups].sort().values
        inside = of_heads[chosen].argsort(dim=1, descending=True, stable=True)[:, :kept_each].sort(1).values
        queries = _positions((chosen.unsqueeze(1) * each + inside).reshape(-1), size)
        keys = _positions(chosen, size)
        cuts |= {f"{path}.{i}.{names[name]}": _Cut(rows=keys) for name in ("k_proj", "v_proj")}
        cuts[f"{path}.{i}.{names['q_proj']}"] = _Cut(rows=queries)
        cuts[f"{path}.{i}.{names['o_proj']}"] = _Cut(columns=queries)
    stated = {"num_attention_heads": kept_groups * kept_each, "num_key_value_heads": kept_groups, "head_dim": size}
    return cuts, stated


def compress(loaded: Loaded, config: Config, context: Context) -> Loaded:
    """The model with fewer neurons and heads in each layer, equally many everywhere.

    Raises:
        UsageProblem: a share is not one.
        ModelProblem: the architecture's configuration cannot state the smaller shapes.
    """
    changed = copy.deepcopy(loaded.model.config)
    values = body_config(changed)
    cuts, stated = _ffn_cuts(loaded, config, values, context)
    more, stated_more = _head_cuts(loaded, config, values, context)
    state: dict[str, Tensor] = dict(loaded.model.state_dict())
    for path, cut in (cuts | more).items():
        weight, turned = state[f"{path}.weight"], isinstance(loaded.model.get_submodule(path), Conv1D)
        for axis, keep in ((int(turned), cut.rows), (1 - int(turned), cut.columns)):
            weight = weight if keep is None else weight.index_select(axis, keep)
        state[f"{path}.weight"] = weight.clone()
        if cut.rows is not None and f"{path}.bias" in state:
            state[f"{path}.bias"] = state[f"{path}.bias"][cut.rows]
    shapes = stated | stated_more
    for key, value in shapes.items():
        setattr(values, key, value)
    return rebuilt(loaded, changed, state, shapes=shapes)
