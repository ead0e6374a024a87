"""Altered images to train on, the same for student and teacher and the same whenever they are asked for.

A view of a row is a pure function of (seed, row, view number): its random numbers are a hash of
these, not the state of a generator. So it does not matter which batch, epoch, process or run asks,
a resumed run goes on with the same images, and what a teacher says of a view can be kept.

A view has one number, view * rows + row, by which the teacher cache knows it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kdtool.data.examples import Examples
from kdtool.errors import UsageProblem
from kdtool.sections import AugmentSection
from kdtool.tasks._base import LABELS, Batch, Task, to_device

PIXELS = "pixel_values"
_SHIFT, _MIX, _OPERATIONS = 1, 2, 3  # one stream of random numbers each
_TRIES = 24
"""Draws for one share of a mixture; each is taken with a probability of more than a half."""


def collated(task: Task, data: Examples, rows: Sequence[int] | np.ndarray, device: str) -> Batch:
    """Encoded rows as a batch on a device."""
    return to_device(task.collate([data[int(i)] for i in rows]), device)


def _scrambled(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: each bit of the result depends on each bit of x (uint64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def uniforms(seed: int, stream: int, numbers: np.ndarray, count: int) -> np.ndarray:
    """Random numbers in [0, 1) that depend on nothing but the arguments.

    Args:
        seed: Of all views.
        stream: Tells apart what is drawn.
        numbers: [batch] numbers of views.
        count: Random numbers for each.

    Returns:
        [batch, count] float64.
    """
    golden = np.array([0x9E3779B97F4A7C15], dtype=np.uint64)  # arrays wrap around without a warning
    key = _scrambled(np.array([seed], dtype=np.uint64) * golden + np.uint64(stream))
    own = _scrambled(_scrambled(numbers.astype(np.uint64) + key) + key)[:, None]
    drawn: np.ndarray = _scrambled(own + np.arange(1, count + 1, dtype=np.uint64) * golden)
    return (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53


def beta_shares(draws: np.ndarray, alpha: float) -> np.ndarray:
    """Shares from Beta(alpha, alpha), alpha at most 1, by Joehnk's method.

    Args:
        draws: [batch, 2 * tries] uniform.
        alpha: Parameter of the distribution.

    Returns:
        [batch] float64 in 0..1.
    """
    left, right = np.log(1 - draws[:, 0::2]) / alpha, np.log(1 - draws[:, 1::2]) / alpha
    top = np.maximum(left, right)
    taken = top + np.log(np.exp(left - top) + np.exp(right - top)) <= 0
    first = np.where(taken.any(1), taken.argmax(1), taken.shape[1] - 1)
    rows = np.arange(len(draws))
    difference = np.clip(right[rows, first] - left[rows, first], -700, 700)
    shares: np.ndarray = 1 / (1 + np.exp(difference))
    return shares


def shifted(images: Tensor, draws: np.ndarray, share: float, flip: bool, fill: Tensor) -> Tensor:
    """Images moved by whole pixels and mirrored, each in its own way.

    Args:
        images: [batch, channels, height, width]
        draws: [batch, 3] uniform, for down, right and mirror.
        share: Largest shift as a share of the side.
        flip: Whether to mirror half of the images.
        fill: [channels, 1, 1], what is seen beyond the edge.
    """
    batch, channels, height, width = images.shape
    down, right = (_places(draws[:, i], share, side) for i, side in enumerate((height, width)))
    if flip:
        right = np.where(draws[:, 2:3] < 0.5, right[:, ::-1], right)
    outside = ((down < 0) | (down >= height))[:, :, None] | ((right < 0) | (right >= width))[:, None, :]
    flat = down.clip(0, height - 1)[:, :, None] * width + right.clip(0, width - 1)[:, None, :]
    index = torch.from_numpy(flat.reshape(batch, 1, -1)).to(images.device)
    moved = images.flatten(2).gather(2, index.expand(-1, channels, -1)).view_as(images)
    return torch.where(torch.from_numpy(outside[:, None]).to(images.device), fill, moved) if share else moved


def _places(draws: np.ndarray, share: float, side: int) -> np.ndarray:
    """For each image, from where each of its rows (or columns) comes: [batch, side]."""
    pad = round(share * side)
    offset = np.floor(draws * (2 * pad + 1)).astype(np.int64) - pad
    return np.asarray(np.arange(side)[None] + offset[:, None])


def boxes(draws: np.ndarray, shares: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rectangles that cover 1 - share of an image, cut off at its edges (CutMix).

    Args:
        draws: [batch, 2] uniform, the centres.
        shares: [batch] of the image that stays.
        height: Of the images.
        width: Of the images.

    Returns:
        Mask [batch, height, width], True inside, and the shares that really stay.
    """
    sides = np.sqrt(1 - shares)[:, None]
    inside = []
    for i, size in enumerate((height, width)):
        centre, half = np.floor(draws[:, i : i + 1] * size), np.floor(sides * size) / 2
        place = np.arange(size)[None]
        inside.append((place >= np.floor(centre - half)) & (place < np.floor(centre + half)))
    mask = inside[0][:, :, None] & inside[1][:, None, :]
    return mask, 1 - mask.mean((1, 2))


@dataclass(frozen=True, slots=True)
class Look:
    """How a processor standardises pixels: (value in 0..1 - mean) / std, both [channels, 1, 1]."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, processor: Any, channels: int) -> "Look":
        """That of an image processor; mean 0 and deviation 1 where it leaves pixels as they are."""
        means, stds = [0.0] * channels, [1.0] * channels
        if getattr(processor, "do_normalize", False):
            means, stds = list(processor.image_mean), list(processor.image_std)
        return cls(torch.tensor(means).view(-1, 1, 1), torch.tensor(stds).view(-1, 1, 1))


class Views:
    """Makes batches of training rows that are not the same in every epoch.

    Args:
        data: Encoded training rows.
        settings: How many views there are, and their seed.
    """

    def __init__(self, data: Examples, settings: AugmentSection) -> None:
        self.data, self.settings = data, settings

    @property
    def count(self) -> int:
        """Views of each row; 0 if each epoch has its own."""
        return self.settings.views

    @property
    def mark(self) -> str:
        """Equal for views that show a row in equal ways."""
        return self.settings.model_dump_json()

    def numbers(self, rows: Sequence[int] | np.ndarray, epoch: int) -> np.ndarray:
        """Numbers [batch] int64 of the views of some rows that belong to an epoch."""
        view = epoch % self.count if self.count else epoch
        return np.asarray(rows, dtype=np.int64) + view * len(self.data)

    def batch(self, numbers: np.ndarray, device: str) -> Batch:
        """The views with these numbers, collated."""
        raise NotImplementedError


class ImageViews(Views):
    """Makes batches of altered images.

    Args:
        task: Collates rows.
        data: Encoded training rows.
        settings: What to do to images.
        processors: Prefix of batch keys (empty, or `teacher0.`) to the processor that made those pixels.
        classes: Number of classes, for the labels of mixed images.

    Raises:
        UsageProblem: an extra is not installed.
    """

    def __init__(
        self, task: Task, data: Examples, settings: AugmentSection, processors: Mapping[str, Any], classes: int
    ) -> None:
        super().__init__(data, settings)
        self.task, self.classes = task, classes
        self.looks = {
            prefix: Look.of(processor, len(data.columns[prefix + PIXELS][0]))
            for prefix, processor in processors.items()
        }
        if settings.randaugment:
            try:
                from kdtool.tasks import _randaugment
            except ModuleNotFoundError as error:
                raise UsageProblem(
                    "augment.randaugment needs kornia", why=str(error), hint="pip install 'kdtool[augment]'"
                ) from None
            self.operate = _randaugment.operate

    def batch(self, numbers: np.ndarray, device: str) -> Batch:
        """The views with these numbers, collated; labels are [batch, classes] probabilities where images are mixed."""
        own = self._altered(numbers, device)
        if not (self.settings.mixup or self.settings.cutmix):
            return own
        draws = uniforms(self.settings.seed, _MIX, numbers, 4 + 2 * _TRIES)
        view = numbers // len(self.data)
        partners = view * len(self.data) + np.floor(draws[:, 0] * len(self.data)).astype(np.int64)
        return self._mixed(own, self._altered(partners, device), draws[:, 1:])

    def _altered(self, numbers: np.ndarray, device: str) -> Batch:
        """Each row by itself: shifted, mirrored, RandAugment."""
        batch = collated(self.task, self.data, numbers % len(self.data), device)
        cfg = self.settings
        for prefix, look in self.looks.items():
            images = batch[prefix + PIXELS]
            mean, std = look.mean.to(images.device), look.std.to(images.device)
            if cfg.crop or cfg.flip:
                draws = uniforms(cfg.seed, _SHIFT, numbers, 3)
                images = shifted(images, draws, cfg.crop, cfg.flip, -mean / std)
            if cfg.randaugment:
                draws = uniforms(cfg.seed, _OPERATIONS, numbers, 2 * cfg.randaugment)
                values = self.operate((images * std + mean).clamp(0, 1), draws, cfg.magnitude / 30)
                images = (values - mean) / std
            batch[prefix + PIXELS] = images
        return batch

    def _mixed(self, own: Batch, other: Batch, draws: np.ndarray) -> Batch:
        """Images and labels mixed in equal shares; a cut-out share is that of the student's pixels."""
        cfg = self.settings
        cut = np.full(len(draws), bool(cfg.cutmix)) if not (cfg.mixup and cfg.cutmix) else draws[:, 0] < 0.5
        shares = np.ones(len(draws))
        for chosen, alpha in ((~cut, cfg.mixup), (cut, cfg.cutmix)):
            if chosen.any():
                shares[chosen] = beta_shares(draws[chosen, 3:], alpha)
        kept, result = shares, dict(own)
        for prefix in sorted(self.looks):  # the student's prefix, which is empty, comes first
            images = own[prefix + PIXELS]
            mask, real = boxes(draws[:, 1:3], shares, *images.shape[2:])
            kept = np.where(cut, real, shares) if not prefix else kept
            weights = np.where(cut[:, None, None], ~mask, shares[:, None, None]).astype(np.float32)
            weight = torch.from_numpy(weights[:, None]).to(images)
            result[prefix + PIXELS] = weight * images + (1 - weight) * other[prefix + PIXELS]
        share = torch.from_numpy(kept.astype(np.float32)).to(own[LABELS].device)[:, None]
        first, second = (functional.one_hot(batch[LABELS], self.classes).float() for batch in (own, other))
        result[LABELS] = share * first + (1 - share) * second
        return result
