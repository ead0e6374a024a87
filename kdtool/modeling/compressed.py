"""Models of transformers with some of their parts in forms that no configuration of theirs can state."""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from kdtool.modeling.linear_forms import LowRankLinear, ResizedLinear
from kdtool.modeling.quantized import QuantizedEmbedding, QuantizedLinear, TiedHead


class Form(Protocol):
    """A module that takes the place of another."""

    @classmethod
    def replacing(cls, old: Any, spec: Mapping[str, Any], whole: nn.Module) -> nn.Module:
        """An untrained module of this form.

        Args:
            old: The module whose place it takes.
            spec: What the configuration says of it, such as `rank`.
            whole: The model around it.
        """


FORMS: dict[str, type[Form]] = {
    "embedding": QuantizedEmbedding,
    "low-rank": LowRankLinear,
    "quantized": QuantizedLinear,
    "resized": ResizedLinear,
    "tied": TiedHead,
}


class CompressedConfig(PreTrainedConfig):
    """Configuration of a compressed model.

    Attributes:
        backbone_config: Configuration of the model around the changed parts.
        forms: Path of each changed module in it to its form: `form`, a key of `FORMS`, and what that needs.
    """

    model_type = "kdtool-compressed"
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: Any = None
    forms: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Turn a stored mapping back into the model's configuration."""
        if isinstance(self.backbone_config, dict):
            values = dict(self.backbone_config)
            self.backbone_config = AutoConfig.for_model(values.pop("model_type"), **values)
        super().__post_init__(**kwargs)


class CompressedModel(PreTrainedModel):
    """A model of transformers with some of its modules replaced."""

    config_class = CompressedConfig
    base_model_prefix = "whole"
    auto_class_name: ClassVar[str]
    """Name of the Auto class that makes the model as it was."""

    def __init__(self, config: CompressedConfig) -> None:
        super().__init__(config)
        self.whole = getattr(transformers, self.auto_class_name).from_config(config.backbone_config)
        # a path comes before those inside it (what was factored may then be quantised), a table before its head
        for path, spec in sorted((config.forms or {}).items(), key=lambda item: (item[1]["form"] == "tied", item[0])):
            old = self.whole.get_submodule(path)
            self.whole.set_submodule(path, FORMS[spec["form"]].replacing(old, spec, self.whole))
        self._untie(config.forms or {})
        self.main_input_name = self.whole.main_input_name
        self.post_init()

    def _untie(self, forms: Mapping[str, Any]) -> None:
        """Forget shared weights that are no longer there; a head on a quantised table reads it itself."""
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            tied = getattr(self.whole, name, None) or {}
            left = {a: b for a, b in tied.items() if not {a.rpartition(".")[0], b.rpartition(".")[0]} & {*forms}}
            setattr(self.whole, name, left)

    @property
    def quantized(self) -> bool:
        """Whether weights are whole numbers, which no optimiser can train."""
        return any(isinstance(module, QuantizedLinear | QuantizedEmbedding) for module in self.modules())

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are those of the model inside, or loaded."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """What the model inside gives."""
        return self.whole(*args, **inputs)


class CompressedForSequenceClassification(CompressedModel):
    """A classifier of text."""

    auto_class_name = "AutoModelForSequenceClassification"
    main_input_name = "input_ids"


class CompressedForImageClassification(CompressedModel):
    """A classifier of images."""

    auto_class_name = "AutoModelForImageClassification"
    main_input_name = "pixel_values"


class CompressedForAudioClassification(CompressedModel):
    """A classifier of recordings."""

    auto_class_name = "AutoModelForAudioClassification"
    main_input_name = "input_values"


class CompressedForMaskedLM(CompressedModel):
    """A language model that fills gaps."""

    auto_class_name = "AutoModelForMaskedLM"
    main_input_name = "input_ids"


class CompressedForCausalLM(CompressedModel):
    """A language model."""

    auto_class_name = "AutoModelForCausalLM"
    main_input_name = "input_ids"

    def generate(self, *args: Any, **options: Any) -> Tensor:
        """Texts of the model inside; see `GenerationMixin.generate`."""
        texts: Tensor = self.whole.generate(*args, **options)
        return texts


KINDS = {kind.auto_class_name: kind for kind in CompressedModel.__subclasses__()}
"""Name of an Auto class to the compressed model it loads."""


def compressed_config(config: Any, forms: Mapping[str, Mapping[str, Any]]) -> CompressedConfig:
    """The configuration of a model with some modules in other forms.

    Args:
        config: Of a model of transformers, or of one that is compressed already.
        forms: Module path in the model of transformers to its form.
    """
    before = (config.forms or {}) if isinstance(config, CompressedConfig) else {}
    inside = copy.deepcopy(config.backbone_config if isinstance(config, CompressedConfig) else config)
    names = {key: getattr(config, key) for key in ("id2label", "label2id")}
    return CompressedConfig(backbone_config=inside, forms={**before, **forms}, **names)


def weights_of(model: nn.Module) -> int:
    """Number of weights, shared ones counted once, packed whole numbers one by one."""
    packed = sum(int(getattr(module, "packed", 0)) for module in model.modules())
    return packed + sum(p.numel() for p in model.parameters())


@torch.no_grad()
def make_compressed(auto: str, config: CompressedConfig) -> CompressedModel:
    """A compressed model whose weights are still to be loaded.

    Args:
        auto: Name of the Auto class of its task, a key of `KINDS`.
        config: Its configuration.
    """
    with torch.random.fork_rng(devices=[]):  # weights are drawn, then replaced
        model: CompressedModel = KINDS[auto](config)
    return model
