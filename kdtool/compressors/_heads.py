"""Attention heads of the families of transformers: which maps are theirs, and how fewer of them are stated."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdtool.compressors._base import Context, body_config, layers_of, linears, skeleton
from kdtool.errors import ModelProblem
from kdtool.modeling.linear_forms import shape_of
from kdtool.models import Loaded

_QUERY, _KEY, _VALUE = ("q_proj", "query", "q_lin"), ("k_proj", "key", "k_lin"), ("v_proj", "value", "v_lin")
_OUT = ("o_proj", "out_proj", "out_lin", "attention.output.dense")
_FUSED, _FUSED_OUT = "attn.c_attn", "attn.c_proj"
_COUNT = ("num_attention_heads", "n_head", "n_heads")


@dataclass(frozen=True, slots=True)
class Cut:
    """What is kept of one linear map: indices of outputs, of inputs; None for all."""

    rows: Tensor | None = None
    columns: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Maps:
    """Paths of the maps of one layer's attention; `query` is the fused one where there is one."""

    query: str
    key: str | None
    value: str | None
    out: str


def positions(heads: Tensor, size: int) -> Tensor:
    """Indices of the dimensions of heads."""
    return (heads.unsqueeze(1) * size + torch.arange(size)).reshape(-1)


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of a model.

    Attributes:
        values: Configuration of the transformer, to be changed.
        count_key: Where it states their number.
        heads: That number.
        groups: Heads of keys and values; several queries may share one.
        size: Dimensions of a head.
        stated: Whether the configuration states the size; else it is the width by the number.
        maps: Of each layer.
        width: Channels between the layers.
    """

    values: Any
    count_key: str
    heads: int
    groups: int
    size: int
    stated: bool
    maps: list[_Maps]
    width: int

    def fitting_width(self, width: int) -> int:
        """The nearest number of channels that a configuration can state: whole heads where it divides by them."""
        return width if self.stated else max(1, round(width / self.size)) * self.size

    def cut(
        self, share: Callable[[int], int], scores: Mapping[str, Tensor], width: int
    ) -> tuple[dict[str, Cut], dict[str, dict[str, Any]]]:
        """Cuts of the attention maps, and forms of those whose shapes the configuration cannot state.

        Whole groups of heads that share keys go; with one group, heads out of it.

        Args:
            share: From a number to what is kept of it.
            scores: Of the inputs of each map, by path.
            width: Channels that stay.

        Raises:
            ModelProblem: queries, keys and values are one map, which only a configuration can make smaller.
        """
        each = self.heads // self.groups
        kept_groups = share(self.groups) if self.groups > 1 else 1
        kept_each = each if self.groups > 1 else share(each)
        kept = kept_groups * kept_each
        implied = kept if self.stated else width // self.size
        if kept != implied and any(maps.key is None for maps in self.maps):
            raise ModelProblem(
                "width: heads and channels of this architecture go together",
                why=f"{kept} heads of {self.size} are not {width} channels",
                hint="equal shares of heads and hidden",
            )
        cuts: dict[str, Cut] = {}
        forms: dict[str, dict[str, Any]] = {}
        for maps in self.maps:
            of_heads = scores[maps.out].reshape(self.groups, each, self.size).square().sum(2)
            chosen = of_heads.sum(1).argsort(descending=True, stable=True)[:kept_groups].sort().values
            inside = of_heads[chosen].argsort(dim=1, descending=True, stable=True)[:, :kept_each].sort(1).values
            queries = positions((chosen.unsqueeze(1) * each + inside).reshape(-1), self.size)
            keys = positions(chosen, self.size)
            cuts[maps.out] = Cut(columns=queries)
            if maps.key is None or maps.value is None:
                whole = self.heads * self.size
                cuts[maps.query] = Cut(rows=torch.cat([queries + part * whole for part in range(3)]))
                continue
            cuts |= {maps.query: Cut(rows=queries), maps.key: Cut(rows=keys), maps.value: Cut(rows=keys)}
            if kept != implied:
                resized = {"form": "resized", "inputs": width, "outputs": len(queries)}
                forms |= {path: dict(resized) for path in (maps.query, maps.key, maps.value)}
                forms[maps.out] = {"form": "resized", "inputs": len(queries), "outputs": width}
        self._state(implied, kept_groups)
        return cuts, forms

    def _state(self, heads: int, groups: int) -> None:
        """Write the new numbers into the configuration."""
        setattr(self.values, self.count_key, heads)
        if self.stated:
            self.values.head_dim = self.size
        if getattr(self.values, "num_key_value_heads", None) is not None:
            self.values.num_key_value_heads = groups


def heads_of(loaded: Loaded, values: Any, width: int, context: Context) -> Heads:
    """The heads of a model.

    Args:
        loaded: The model.
        values: Configuration of its transformer, to be changed by `Heads.cut`.
        width: Channels between its layers.
        context: Gives the task.

    Raises:
        ModelProblem: they cannot be found.
    """
    count_key = next((name for name in _COUNT if isinstance(getattr(values, name, None), int)), None)
    path, layers = layers_of(loaded)
    maps = [_maps(f"{path}.{i}.", linears(layer)) for i, layer in enumerate(layers)]
    if count_key is None or any(found is None for found in maps):
        raise ModelProblem(f"width: the attention heads of '{loaded.ref}' cannot be told", hint="heads=1 and hidden=1")
    heads = int(getattr(values, count_key))
    groups = int(getattr(values, "num_key_value_heads", None) or heads)
    found = [one for one in maps if one is not None]
    inputs = shape_of(loaded.model.get_submodule(found[0].out))[0]
    stated = _states_size(loaded, found[0], inputs // heads, context)
    return Heads(values, count_key, heads, groups, inputs // heads, stated, found, width)


def _states_size(loaded: Loaded, maps: _Maps, size: int, context: Context) -> bool:
    """Whether the architecture reads the size of a head from its configuration: one with another size is made."""
    config = copy.deepcopy(loaded.model.config)
    body_config(config).head_dim = 2 * size
    try:
        other = skeleton(loaded, config, context).get_submodule(maps.out)
    except (ValueError, RuntimeError):
        return False
    return bool(shape_of(other)[0] == 2 * shape_of(loaded.model.get_submodule(maps.out))[0])


def _maps(prefix: str, found: Mapping[str, Any]) -> _Maps | None:
    """The attention maps of a layer; None where they are not exactly those of one attention."""
    if _FUSED in found and _FUSED_OUT in found:
        return _Maps(prefix + _FUSED, None, None, prefix + _FUSED_OUT)
    picked = []
    for names in (_QUERY, _KEY, _VALUE, _OUT):
        paths = [path for path in found if any(path == name or path.endswith(f".{name}") for name in names)]
        if len(paths) != 1:
            return None
        picked.append(prefix + paths[0])
    return _Maps(*picked)
