"""The residual networks of 6n + 2 layers for 32x32 images (He et al., 2016, section 4.2).

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, 2016, arXiv:1512.03385. Shortcuts
have no weights (option A): where width or stride changes they take every second row and column and
pad the channels with zeros, half in front and half behind.

transformers' own ResNet has another stem and shortcuts with weights and cannot hold such networks.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from kdtool.errors import ModelProblem

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of the red, green and blue values in 0..1 that the published weights expect."""


class CifarResNetConfig(PreTrainedConfig):
    """Configuration of `CifarResNetForImageClassification`.

    Attributes:
        n: Blocks in each stage; the network has 6n + 2 layers.
        widths: Channels of each stage.
        num_channels: Channels of the image.
        image_size: Side of the image in pixels; others work too.
    """

    model_type = "kdtool-cifar-resnet"

    n: int = 3
    widths: Any = (16, 32, 64)
    num_channels: int = 3
    image_size: int = 32

    def __post_init__(self, **kwargs: Any) -> None:
        """Keep the widths as a list, as JSON has them."""
        self.widths = [int(width) for width in self.widths]
        super().__post_init__(**kwargs)


def shortcut(x: Tensor, channels: int, stride: int) -> Tensor:
    """The input of a block in the shape of its output, without weights.

    Args:
        x: [batch, c, height, width]
        channels: Channels of the block's output, at least c.
        stride: Of the block.

    Returns:
        [batch, channels, ceil(height / stride), ceil(width / stride)]
    """
    extra = channels - x.shape[1]
    if not extra and stride == 1:
        return x
    return functional.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, extra // 2, extra - extra // 2))


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut without weights."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.width, self.stride = width, stride
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, h, w] to [batch, width, h / stride, w / stride], after the ReLU."""
        inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        result: Tensor = self.relu(inner + shortcut(x, self.width, self.stride))
        return result


class CifarResNetForImageClassification(PreTrainedModel):
    """3x3 convolution, stages of residual blocks, mean over all pixels, linear head.

    Modules are named as in the published checkpoints, so their tensors fit as they are.
    """

    config_class = CifarResNetConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        first = config.widths[0]
        self.conv1 = nn.Conv2d(config.num_channels, first, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        before = first
        for number, width in enumerate(config.widths, start=1):
            strides = [1 if number == 1 else 2] + [1] * (config.n - 1)
            blocks = [Block(before if i == 0 else width, width, stride) for i, stride in enumerate(strides)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            before = width
        self.linear = nn.Linear(before, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    @property
    def stage_paths(self) -> list[str]:
        """Paths of the stages, for feature taps."""
        return [f"layer{number}" for number in range(1, len(self.config.widths) + 1)]

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        """Logits [batch, classes] of images [batch, 3, height, width], and the mean cross-entropy with labels."""
        x = self.relu(self.bn1(self.conv1(pixel_values)))
        for path in self.stage_paths:
            x = self.get_submodule(path)(x)
        logits = self.linear(x.mean((2, 3)))
        loss = None if labels is None else functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def from_checkpoint(path: str | Path, labels: Sequence[str] | None = None) -> CifarResNetForImageClassification:
    """A model with the weights of a flat checkpoint, its depth and widths read from the tensors.

    Args:
        path: A .safetensors file with tensors `conv1.weight`, `bn1.*`, `layerL.B.conv1.weight`, ...,
            `linear.weight`, `linear.bias`; a leading `module.` is ignored.
        labels: Class names in id order; by default LABEL_0 and so on.

    Raises:
        ModelProblem: the file is damaged, of another architecture, or has another number of classes.
    """
    try:
        state = {name.removeprefix("module."): tensor for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ModelProblem(f"'{path}' cannot be read", why=str(error).split("\n", 1)[0]) from None
    found = [re.fullmatch(r"layer(\d+)\.(\d+)\.conv2\.weight", name) for name in state]
    blocks = {(int(match[1]), int(match[2])): match[0] for match in found if match}
    if not blocks or "linear.weight" not in state:
        raise ModelProblem(f"'{path}' is no CIFAR ResNet", why="tensors such as layer1.0.conv2.weight are missing")
    stages = sorted({stage for stage, _ in blocks})
    names = labels if labels is not None else [f"LABEL_{i}" for i in range(len(state["linear.weight"]))]
    config = CifarResNetConfig(
        n=1 + max(number for _, number in blocks),
        widths=[len(state[blocks[stage, 0]]) for stage in stages],
        num_channels=state["conv1.weight"].shape[1],
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    model = CifarResNetForImageClassification(config)
    # counters of batches seen, which only a running mean without momentum would need, are in some files only
    wanted = {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    given = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    wrong = sorted(wanted.keys() ^ given.keys())
    wrong = wrong or [name for name, tensor in wanted.items() if tensor.shape != given[name].shape]
    if wrong:
        raise ModelProblem(f"'{path}' does not fit a CIFAR ResNet with {len(names)} classes", why=f"see {wrong[0]}")
    model.load_state_dict(state, strict=False)
    model.eval()
    return model


def image_processor(size: int = 32) -> Any:
    """The image processor these networks expect: values in 0..1, standardised, nothing resized.

    Its `save_pretrained(folder)` writes the preprocessor_config.json that belongs beside the model.
    """
    from transformers import ViTImageProcessorPil  # needs Pillow, the network itself does not

    return ViTImageProcessorPil(
        do_resize=False,
        size={"height": size, "width": size},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(MEAN),
        image_std=list(STD),
    )
