"""Store weights as whole numbers of 8 or 4 bits; with int8-dynamic the products are of whole numbers, too."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdtool.compressors._base import Context, Made, in_memory, layers_of, linears, matrix_of, reformed
from kdtool.errors import ModelProblem, UsageProblem
from kdtool.lazy import Lazy, State
from kdtool.modeling.linear_forms import shape_of
from kdtool.modeling.quantized import QuantizedEmbedding, QuantizedLinear, groups_of, quantize
from kdtool.models import Loaded

paper = (
    "Dettmers, Lewis, Belkada, Zettlemoyer: LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, 2022, "
    "arXiv:2208.07339"
)
streams = True
trainable = False
dials = {"scheme": ("int8", "int4"), "embeddings": ("int8", "int4")}


@dataclass(frozen=True)
class Config:
    """Settings."""

    scheme: Literal["int8", "int4", "int8-dynamic"] = "int8"
    """8 or 4 bits for the weights alone, or 8 bits for the weights and, as they come, for their inputs."""
    group: int = 32
    """Neighbouring weights of a row that share a scale with int4; 8 bits have one scale for each row."""
    embeddings: Literal["int8", "int4", "keep"] = "int8"
    """Number format of the tables of embeddings."""


def _spec(bits: int, config: Config) -> dict[str, Any]:
    return {"bits": bits, "group": config.group if bits < 8 else None}


def _head(loaded: Loaded) -> str | None:
    """Path of the map whose outputs are the logits; None where it cannot be told."""
    model: Any = loaded.model
    out = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    parts = linears(loaded.model)
    if out is not None:
        return next((name for name, part in parts.items() if part is out), None)
    last = [name for name, part in parts.items() if shape_of(part)[1] == len(loaded.labels or ())]
    return last[-1] if last else None


def forms_of(loaded: Loaded, config: Config) -> dict[str, dict[str, Any]]:
    """The form of each module that is quantised: linear maps but those of the logits, and tables.

    The head of a language model is quantised where it shares the embeddings' table: there is one table.
    """
    bits = 4 if config.scheme == "int4" else 8
    head = _head(loaded)
    spec = {"form": "quantized", **_spec(bits, config), "dynamic": config.scheme == "int8-dynamic"}
    forms = {path: dict(spec) for path in linears(loaded.model) if path != head}
    if config.embeddings == "keep":
        return forms
    # subclasses do more than look up, such as shifting positions
    tables = {path: part for path, part in loaded.model.named_modules() if type(part) is nn.Embedding}
    table_bits = 4 if config.embeddings == "int4" else 8
    out: Any = loaded.model.get_submodule(head) if head else None
    for path, table in tables.items():
        forms[path] = {"form": "embedding", **_spec(table_bits, config)}
        if out is not None and out.weight is table.weight:
            assert head is not None
            forms[head] = {"form": "tied", "to": path.removeprefix("whole.")}
    return forms


class _Once:
    """Codes and scale of one matrix, asked for in turn, computed once."""

    def __init__(self, weight: Lazy, read: Callable[[Tensor], Tensor], bits: int, group: int | None) -> None:
        self.weight, self.read, self.bits, self.group = weight, read, bits, group
        self.scale: Tensor | None = None

    def codes(self) -> Tensor:
        """Rounds the matrix, and keeps the scale until it is asked for."""
        codes, self.scale = quantize(self.read(self.weight.load()), self.bits, self.group)
        return codes

    def scales(self) -> Tensor:
        """The scale, of the codes just computed or computed anew."""
        if self.scale is None:
            self.codes()
        scale, self.scale = self.scale, None
        assert scale is not None
        return scale


def _rounded(weight: Lazy, module: nn.Module, form: dict[str, Any]) -> dict[str, Lazy]:
    """The tensors that take the place of a matrix."""
    rows, columns = weight.shape if isinstance(module, nn.Embedding) else shape_of(module)[::-1]
    bits, group = form["bits"], form["group"]
    once = _Once(weight, lambda value: matrix_of(module, value), bits, group)
    width, kind = (columns, torch.int8) if bits == 8 else ((columns + 1) // 2, torch.uint8)
    shape = (rows, groups_of(columns, group))
    return {"codes": Lazy((rows, width), kind, once.codes), "scale": Lazy(shape, torch.float32, once.scales)}


def stream(loaded: Loaded, state: State, config: Config, context: Context) -> Made:
    """The model with its matrices and tables in whole numbers, weight by weight.

    Raises:
        UsageProblem: the group is none.
        ModelProblem: the model is quantised already, or its task is not one of classification or language.
    """
    if config.group < 1:
        raise UsageProblem(f"quantize: group={config.group} is no number of weights", hint="such as 32 or 128")
    if any(isinstance(part, QuantizedLinear | QuantizedEmbedding) for part in loaded.model.modules()):
        raise ModelProblem(f"quantize: '{loaded.ref}' is quantised already", hint="quantize the model it was made of")
    layers_of(loaded)  # refuses what is no transformer, such as convolutions alone
    forms = forms_of(loaded, config)
    changed, prefix = reformed(loaded, loaded.model.config, forms, context)
    made: State = {}
    for name, lazy in state.items():
        path, _, leaf = name.rpartition(".")
        form = forms.get(path)
        if form is None or leaf != "weight":
            made[prefix + name] = lazy
        elif form["form"] != "tied":
            parts = _rounded(lazy, loaded.model.get_submodule(path), form)
            made |= {f"{prefix}{path}.{key}": part for key, part in parts.items()}
    facts = {"scheme": config.scheme, "matrices": len(forms)}
    return Made(changed, made, facts)


def compress(loaded: Loaded, config: Config, context: Context) -> Loaded:
    """The model with its matrices and tables in whole numbers; see `stream`."""
    return in_memory(stream, loaded, config, context)
