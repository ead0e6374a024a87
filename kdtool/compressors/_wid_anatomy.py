"""Where the linear maps, norms and embeddings of an encoder lie, and which dimensions they share (WID, 3.1 and 3.2).

Keep-sets align what is cut: `hidden` is the residual stream, `attn.l` and `ffn.l` the inner sides of layer l,
`mlm` or `head` the output of the head's transform.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from kdtool.compressors._base import body_config
from kdtool.errors import ModelProblem


@dataclass(frozen=True, slots=True)
class Site:
    """One linear map.

    Attributes:
        path: Module path in the model.
        key: Stem of its compactors' names: KEY_in and KEY_out.
        inner: Keep-set of its inputs; None where they are not cut.
        outer: Keep-set of its outputs; None where they are not cut.
    """

    path: str
    key: str
    inner: str | None
    outer: str | None


@dataclass(frozen=True, slots=True)
class Anatomy:
    """An encoder with its head.

    Attributes:
        hidden: Width H of the residual stream.
        heads: Attention heads in a layer.
        intermediate: Width F between the feed-forward maps.
        depth: Number of layers.
        sites: Linear maps.
        norms: Path of each LayerNorm to its keep-set.
        entry: Path of the module that the embeddings go through first, which the compactor of the stream stands
            before; None where a linear map makes the stream.
        tables: Parameters whose last dimension is the stream: embeddings, positions.
        patches: Path of the convolution that embeds image patches, if any.
        stated: Configuration keys of H, heads and F, in that order.
        pooled: Path of a norm after which vectors are brought to unit length, if any.
    """

    hidden: int
    heads: int
    intermediate: int
    depth: int
    sites: tuple[Site, ...]
    norms: Mapping[str, str]
    entry: str | None
    tables: tuple[str, ...]
    patches: str | None
    stated: tuple[str, str, str]
    pooled: str | None = None

    @property
    def head_size(self) -> int:
        """Dimensions of a head."""
        return self.hidden // self.heads

    @property
    def sizes(self) -> dict[str, int]:
        """Keep-set to its number of dimensions."""
        groups = [group for site in self.sites for group in (site.inner, site.outer) if group is not None]
        return {group: self.intermediate if group.startswith("ffn.") else self.hidden for group in groups}

    def judge(self, group: str) -> str:
        """Stem of the in-compactor whose columns decide what a keep-set keeps."""
        kind, _, layer = group.partition(".")
        names = {
            "hidden": "layer.0.value",
            "attn": f"layer.{layer}.attn_output",
            "ffn": f"layer.{layer}.output",
        }
        return names.get(kind) or f"{kind}_decoder"


@dataclass(frozen=True, slots=True)
class _Family:
    """Names of the parts of one kind of encoder; paths are relative to its body, or to a layer.

    `maps` are query, key, value, attention output, intermediate, output.
    """

    layers: str
    maps: tuple[str, str, str, str, str, str]
    layer_norms: tuple[str, str]
    entry: str
    tables: tuple[str, ...]
    norms: tuple[str, ...] = ()
    patches: str | None = None
    stated: tuple[str, str, str] = ("hidden_size", "num_attention_heads", "intermediate_size")


_KEYS = ("query", "key", "value", "attn_output", "intermediate", "output")
_EMBEDDINGS = tuple(f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type"))

_BERT = _Family(
    "encoder.layer",
    (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    ("attention.output.LayerNorm", "output.LayerNorm"),
    "embeddings.LayerNorm",
    _EMBEDDINGS,
    ("embeddings.LayerNorm",),
)
_DISTILBERT = _Family(
    "transformer.layer",
    ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"),
    ("sa_layer_norm", "output_layer_norm"),
    "embeddings.LayerNorm",
    _EMBEDDINGS[:2],
    ("embeddings.LayerNorm",),
    stated=("dim", "n_heads", "hidden_dim"),
)
_VIT = _Family(
    "layers",
    ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"),
    ("layernorm_before", "layernorm_after"),
    "embeddings.dropout",
    ("embeddings.cls_token", "embeddings.position_embeddings"),
    ("layernorm",),
    "embeddings.patch_embeddings.projection",
)
_FAMILIES = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
    "vit": _VIT,
}
_PROJECT = "embeddings_project"
"""Where ELECTRA's embeddings are narrower than its layers: the map from one to the other."""


@dataclass(frozen=True, slots=True)
class _Head:
    """A head by the paths of its maps; the transform and its norm may be missing."""

    group: str
    transform: str | None
    norm: str | None
    decoder: str


_HEADS = (
    _Head("mlm", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.decoder"),
    _Head("mlm", "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
    _Head("mlm", "generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head"),
    _Head("mlm", "vocab_transform", "vocab_layer_norm", "vocab_projector"),
    _Head("head", "bert.pooler.dense", None, "classifier"),
    _Head("head", "classifier.dense", None, "classifier.out_proj"),
    _Head("head", "pre_classifier", None, "classifier"),
    _Head("head", None, None, "classifier"),
)


@dataclass(slots=True)
class _Parts:
    """What is being collected."""

    sites: list[Site] = field(default_factory=list)
    norms: dict[str, str] = field(default_factory=dict)


def _has(model: nn.Module, path: str) -> bool:
    try:
        return isinstance(model.get_submodule(path), nn.Module)
    except AttributeError:
        return False


def _add_layers(parts: _Parts, family: _Family, body: str, depth: int) -> None:
    for i in range(depth):
        at, attn, ffn = f"{body}.{family.layers}.{i}", f"attn.{i}", f"ffn.{i}"
        sides = [("hidden", attn)] * 3 + [(attn, "hidden"), ("hidden", ffn), (ffn, "hidden")]
        for key, name, (inner, outer) in zip(_KEYS, family.maps, sides, strict=True):
            parts.sites.append(Site(f"{at}.{name}", f"layer.{i}.{key}", inner, outer))
        parts.norms |= {f"{at}.{name}": "hidden" for name in family.layer_norms}


def _add_head(parts: _Parts, model: nn.Module, narrow: bool) -> None:
    """Sites of the head; with `narrow` its transform leads to embeddings of another width, which stay."""
    for head in _HEADS:
        if not all(_has(model, path) for path in (head.transform, head.norm, head.decoder) if path):
            continue
        inner: str | None = "hidden"
        if head.transform is not None:
            whole = narrow and head.group == "mlm"
            parts.sites.append(Site(head.transform, f"{head.group}_transform", "hidden", None if whole else head.group))
            inner = None if whole else head.group
        if inner is not None:
            parts.sites.append(Site(head.decoder, f"{head.group}_decoder", inner, None))
            if head.norm is not None:
                parts.norms[head.norm] = inner
        return
    raise ModelProblem(f"wid: the head of {type(model).__name__} is not one that it knows")


def anatomy_of(model: Any) -> Anatomy:
    """The parts of a model.

    Raises:
        ModelProblem: it is no encoder of a known kind, or its head is not known.
    """
    config = body_config(model.config)
    family = _FAMILIES.get(config.model_type)
    if family is None or getattr(config, "is_decoder", False):
        raise ModelProblem(
            f"wid cannot take a {type(model).__name__}",
            why=f"it knows encoders: {', '.join(_FAMILIES)}",
            hint="layers, width and low-rank take decoders, too",
        )
    body = model.base_model_prefix
    depth = int(config.num_hidden_layers)
    hidden, heads, intermediate = (int(getattr(config, key)) for key in family.stated)
    narrow = _has(model, f"{body}.{_PROJECT}")
    parts = _Parts()
    if narrow:
        parts.sites.append(Site(f"{body}.{_PROJECT}", "emb", None, "hidden"))
    else:
        parts.norms |= {f"{body}.{name}": "hidden" for name in family.norms}
    _add_layers(parts, family, body, depth)
    _add_head(parts, model, narrow)
    last = f"{body}.{family.layers}.{depth - 1}.{family.layer_norms[1]}"
    return Anatomy(
        hidden,
        heads,
        intermediate,
        depth,
        tuple(parts.sites),
        parts.norms,
        None if narrow else f"{body}.{family.entry}",
        () if narrow else tuple(f"{body}.{name}" for name in family.tables),
        f"{body}.{family.patches}" if family.patches else None,
        family.stated,
        last if getattr(model.config, "normalize", False) else None,
    )
