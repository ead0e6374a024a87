"""A student that answers through its teacher's classifier (SimKD).

Chen, Mei, Zhang, Wang, Feng, Chen: Knowledge Distillation with the Reused Teacher Classifier, 2022,
arXiv:2203.14001. The backbone is any classifier without its head; a projector brings its last
features to the teacher's width, and the teacher's own linear layer reads their mean.
"""

from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from kdtool.features import POOLED, as_map, taps


class SimKDConfig(PreTrainedConfig):
    """Configuration of the SimKD students.

    Attributes:
        backbone_config: Configuration of the backbone, a classifier of the same task.
        head_path: Module path of the backbone's own head, which is not used.
        tap: Where its features are taken: the path of a module, or `pooled`, what reaches the head.
        map_size: Height and width that larger feature maps are pooled to; None to leave them.
        in_width: Channels of the backbone's features.
        mid_width: Channels inside the projector.
        out_width: Channels of the teacher's features.
    """

    model_type = "kdtool-simkd"
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: Any = None
    head_path: str = ""
    tap: str = POOLED
    map_size: Any = None
    in_width: int = 64
    mid_width: int = 32
    out_width: int = 64

    def __post_init__(self, **kwargs: Any) -> None:
        """Turn a stored mapping back into the backbone's configuration."""
        if isinstance(self.backbone_config, dict):
            values = dict(self.backbone_config)
            self.backbone_config = AutoConfig.for_model(values.pop("model_type"), **values)
        super().__post_init__(**kwargs)


class PatientBatchNorm(nn.BatchNorm2d):
    """Batch norm that takes its running statistics where a batch holds one value for each channel."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch gives it
        """[batch, channels, height, width], normalised."""
        if self.training and input.numel() == input.shape[1]:
            return functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(input)


class Projector(nn.Sequential):
    """1x1 to `middle`, 3x3, 1x1 to `after` channels, each followed by batch norm and ReLU."""

    def __init__(self, before: int, middle: int, after: int) -> None:
        layers: list[nn.Module] = []
        for size, left, right in ((1, before, middle), (3, middle, middle), (1, middle, after)):
            layers += [nn.Conv2d(left, right, size, padding=size // 2, bias=False), PatientBatchNorm(right), nn.ReLU()]
        super().__init__(*layers)


def pooled_to(value: Tensor, size: Any) -> Tensor:
    """A map [batch, channels, height, width] average-pooled to at most `size`; None leaves it."""
    if size is None or tuple(value.shape[2:]) == tuple(size):
        return value
    height, width = size
    return functional.adaptive_avg_pool2d(value, (min(height, value.shape[2]), min(width, value.shape[3])))


class SimKDModel(PreTrainedModel):
    """Backbone, projector, mean over positions, the teacher's linear layer."""

    config_class = SimKDConfig
    base_model_prefix = "backbone"
    auto_class_name: ClassVar[str]
    """Name of the Auto class that makes the backbone."""

    def __init__(self, config: SimKDConfig) -> None:
        super().__init__(config)
        self.backbone = getattr(transformers, self.auto_class_name).from_config(config.backbone_config)
        self.main_input_name = self.backbone.main_input_name
        self.backbone.set_submodule(config.head_path, nn.Identity())
        self.projector = Projector(config.in_width, config.mid_width, config.out_width)
        self.classifier = nn.Linear(config.out_width, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def features(self, **inputs: Any) -> Tensor:
        """The backbone's features in the teacher's width, [batch, out_width, height, width]."""
        found: list[Tensor] = []
        if self.config.tap == POOLED:
            head = self.backbone.get_submodule(self.config.head_path)
            handle = head.register_forward_pre_hook(lambda _, args: found.append(args[0]))
            try:
                self.backbone(**inputs)
            finally:
                handle.remove()
        else:
            with taps(self.backbone, [self.config.tap], 0) as values:
                self.backbone(**inputs)
            found.append(values[self.config.tap])
        projected: Tensor = self.projector(pooled_to(as_map(found[0]), self.config.map_size))
        return projected

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> ImageClassifierOutput:
        """Logits [batch, classes] of the backbone's inputs, and the mean cross-entropy with labels [batch]."""
        inputs.pop("return_dict", None)
        logits = self.classifier(self.features(**inputs).mean((2, 3)))
        loss = None if labels is None else functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class SimKDForImageClassification(SimKDModel):
    """A SimKD student on images."""

    auto_class_name = "AutoModelForImageClassification"
    main_input_name = "pixel_values"


class SimKDForSequenceClassification(SimKDModel):
    """A SimKD student on text."""

    auto_class_name = "AutoModelForSequenceClassification"
    main_input_name = "input_ids"


class SimKDForAudioClassification(SimKDModel):
    """A SimKD student on recordings."""

    auto_class_name = "AutoModelForAudioClassification"
    main_input_name = "input_values"


class SimKDForTabularClassification(SimKDModel):
    """A SimKD student on rows of tables."""

    auto_class_name = "AutoModel"
    main_input_name = "numeric"


KINDS = {kind.auto_class_name: kind for kind in SimKDModel.__subclasses__()}
"""Name of an Auto class to the SimKD student it loads."""


@torch.no_grad()
def assemble(config: SimKDConfig, auto: str, backbone: nn.Module, projector: Projector, head: nn.Linear) -> SimKDModel:
    """A SimKD student from its trained parts, which are copied.

    Args:
        config: Its configuration.
        auto: Name of the Auto class of its task, a key of `KINDS`.
        backbone: The trained student, with its own head still on.
        projector: The trained projector.
        head: The teacher's classifier.
    """
    with torch.random.fork_rng(devices=[]):  # weights are drawn, then replaced
        model: SimKDModel = KINDS[auto](config)
    unused = f"{config.head_path}."
    state = {name: tensor for name, tensor in backbone.state_dict().items() if not name.startswith(unused)}
    model.backbone.load_state_dict(state)
    model.projector.load_state_dict(projector.state_dict())
    model.classifier.weight.copy_(head.weight)
    bias: Any = head.bias
    model.classifier.bias.copy_(torch.zeros(len(head.weight)) if bias is None else bias)
    model.to(head.weight.device)
    return model
