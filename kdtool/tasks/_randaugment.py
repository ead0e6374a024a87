"""RandAugment by kornia's functions, each image with operations of its own.

Cubuk, Zoph, Shlens, Le: RandAugment: Practical automated data augmentation with a reduced search
space, 2020, arXiv:1909.13719. kornia's own RandAugment draws one operation for a whole batch, from
a global generator; here images that drew the same one are taken together.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from kornia import enhance
from kornia.geometry import transform
from torch import Tensor

_Operation = Callable[[Tensor, Tensor], Any]  # kornia is not typed


def _turn(images: Tensor, amount: Tensor) -> Any:
    return transform.rotate(images, 30 * amount)


def _shear_x(images: Tensor, amount: Tensor) -> Any:
    return transform.shear(images, torch.stack([0.3 * amount, 0 * amount], 1))


def _shear_y(images: Tensor, amount: Tensor) -> Any:
    return transform.shear(images, torch.stack([0 * amount, 0.3 * amount], 1))


def _move_x(images: Tensor, amount: Tensor) -> Any:
    return transform.translate(images, torch.stack([0.45 * images.shape[3] * amount, 0 * amount], 1))


def _move_y(images: Tensor, amount: Tensor) -> Any:
    return transform.translate(images, torch.stack([0 * amount, 0.45 * images.shape[2] * amount], 1))


def _brightness(images: Tensor, amount: Tensor) -> Any:
    return enhance.adjust_brightness_accumulative(images, 1 + 0.9 * amount)


def _color(images: Tensor, amount: Tensor) -> Any:
    return enhance.adjust_saturation_with_gray_subtraction(images, 1 + 0.9 * amount)


def _contrast(images: Tensor, amount: Tensor) -> Any:
    return enhance.adjust_contrast_with_mean_subtraction(images, 1 + 0.9 * amount)


def _sharpness(images: Tensor, amount: Tensor) -> Any:
    return enhance.sharpness(images, 1 + 0.9 * amount)


def _posterize(images: Tensor, amount: Tensor) -> Any:
    return enhance.posterize(images, (8 - 4 * amount.abs()).round().to(torch.int32))


def _solarize(images: Tensor, amount: Tensor) -> Any:
    return torch.where(images >= 1 - amount.abs().view(-1, 1, 1, 1), 1 - images, images)


OPERATIONS: Mapping[str, _Operation] = {
    "identity": lambda images, _: images,
    "autocontrast": lambda images, _: enhance.normalize_min_max(images),
    "equalize": lambda images, _: enhance.equalize(images),
    "rotate": _turn,
    "shear-x": _shear_x,
    "shear-y": _shear_y,
    "translate-x": _move_x,
    "translate-y": _move_y,
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
}
"""Name to function of images [n, channels, height, width] in 0..1 and amounts [n] in -1..1."""

_NEEDS_COLOUR = frozenset({"color"})


def operate(images: Tensor, draws: np.ndarray, magnitude: float) -> Tensor:
    """Images after some operations each, drawn with equal probability.

    Args:
        images: [batch, channels, height, width] in 0..1.
        draws: [batch, 2 * operations] uniform, for which operation and in which direction.
        magnitude: Strength, 0 to 1.
    """
    names = [name for name in OPERATIONS if images.shape[1] == 3 or name not in _NEEDS_COLOUR]
    images = images.clone()
    for turn in range(draws.shape[1] // 2):
        chosen = np.floor(draws[:, 2 * turn] * len(names)).astype(np.int64)
        signs = np.where(draws[:, 2 * turn + 1] < 0.5, -magnitude, magnitude)
        amounts = torch.from_numpy(signs).to(images)
        for number in np.unique(chosen):
            rows = torch.from_numpy(np.flatnonzero(chosen == number)).to(images.device)
            images[rows] = OPERATIONS[names[number]](images[rows], amounts[rows]).clamp(0, 1).to(images.dtype)
    return images
