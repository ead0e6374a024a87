"""Models whose matrices are products of two thin ones; transformers has no configuration for such shapes."""

from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D


class LowRankConfig(PreTrainedConfig):
    """Configuration of a low-rank model.

    Attributes:
        backbone_config: Configuration of the model as it was.
        ranks: Module path of each factored linear map to its rank.
    """

    model_type = "kdtool-low-rank"
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: Any = None
    ranks: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Turn a stored mapping back into the model's configuration."""
        if isinstance(self.backbone_config, dict):
            values = dict(self.backbone_config)
            self.backbone_config = AutoConfig.for_model(values.pop("model_type"), **values)
        super().__post_init__(**kwargs)


class LowRankLinear(nn.Module):
    """y = B (A x) + b with A [rank, inputs] and B [outputs, rank]."""

    def __init__(self, inputs: int, rank: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, rank, bias=False)
        self.outer = nn.Linear(rank, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        y: Tensor = self.outer(self.inner(x))
        return y


def factor(model: nn.Module, ranks: dict[str, int]) -> None:
    """Replace linear maps by untrained low-rank ones, in place."""
    for path, rank in ranks.items():
        old: Any = model.get_submodule(path)
        inputs, outputs = old.weight.shape if isinstance(old, Conv1D) else old.weight.shape[::-1]
        model.set_submodule(path, LowRankLinear(inputs, rank, outputs, old.bias is not None))


class LowRankModel(PreTrainedModel):
    """A model of transformers with some of its linear maps factored."""

    config_class = LowRankConfig
    base_model_prefix = "whole"
    auto_class_name: ClassVar[str]
    """Name of the Auto class that makes the model as it was."""

    def __init__(self, config: LowRankConfig) -> None:
        super().__init__(config)
        self.whole = getattr(transformers, self.auto_class_name).from_config(config.backbone_config)
        factor(self.whole, config.ranks or {})
        self.main_input_name = self.whole.main_input_name
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are those of the model inside, or loaded."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """What the model inside gives."""
        return self.whole(*args, **inputs)


class LowRankForSequenceClassification(LowRankModel):
    """A classifier of text."""

    auto_class_name = "AutoModelForSequenceClassification"
    main_input_name = "input_ids"


class LowRankForImageClassification(LowRankModel):
    """A classifier of images."""

    auto_class_name = "AutoModelForImageClassification"
    main_input_name = "pixel_values"


class LowRankForAudioClassification(LowRankModel):
    """A classifier of recordings."""

    auto_class_name = "AutoModelForAudioClassification"
    main_input_name = "input_values"


class LowRankForCausalLM(LowRankModel):
    """A language model, for scoring texts."""

    auto_class_name = "AutoModelForCausalLM"
    main_input_name = "input_ids"


KINDS = {kind.auto_class_name: kind for kind in LowRankModel.__subclasses__()}
"""Name of an Auto class to the low-rank model it loads."""


@torch.no_grad()
def assemble(whole: nn.Module, auto: str, factors: dict[str, tuple[Tensor, Tensor]]) -> LowRankModel:
    """A low-rank model from a model, which is left as it is, and factors of some of its maps.

    Args:
        whole: A model of transformers.
        auto: Name of the Auto class of its task, a key of `KINDS`.
        factors: Module path to B [outputs, rank] and A [rank, inputs].
    """
    source: Any = whole
    ranks = {path: len(inner) for path, (_, inner) in factors.items()}
    names = {key: getattr(source.config, key) for key in ("id2label", "label2id")}
    config = LowRankConfig(backbone_config=source.config, ranks=ranks, **names)
    with torch.random.fork_rng(devices=[]):  # weights are drawn, then replaced
        model: LowRankModel = KINDS[auto](config)
    state = {}
    for name, tensor in whole.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if path not in factors:
            state[name] = tensor
        elif leaf == "bias":
            state[f"{path}.outer.bias"] = tensor
    for path, (outer, inner) in factors.items():
        state |= {f"{path}.outer.weight": outer, f"{path}.inner.weight": inner}
    model.whole.load_state_dict(state)
    model.eval()
    return model
