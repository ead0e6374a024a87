"""Image classification: one image, one class."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch

from kdtool.data.examples import Examples, LazyColumn
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.sections import RunConfig
from kdtool.tasks._base import LABELS, Batch
from kdtool.tasks._classification import ClassificationTask

_IN_MEMORY = 2 * 2**30
"""Processed images up to this many bytes are kept; larger sets are processed again in each epoch."""


class _Processed(LazyColumn):
    """Images run through an image processor on access."""

    def __init__(self, images: Any, processor: Any) -> None:
        self.images = images
        self.processor = processor

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The rows at `indices`; nothing is decoded."""
        images: Any = self.images
        taken = images.take(indices) if isinstance(images, LazyColumn) else [images[i] for i in indices]
        return type(self)(taken, self.processor)

    def __getitem__(self, index: Any) -> Any:
        pixels = self.processor(images=self.images[index], return_tensors="np")["pixel_values"][0]
        return np.asarray(pixels, dtype=np.float32)


class Task(ClassificationTask):
    """Images through AutoModelForImageClassification."""

    name: ClassVar[str] = "image-classification"
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    processor_class: ClassVar[str] = "AutoImageProcessor"
    columns: ClassVar[tuple[str, ...]] = ("image", "label")
    default_lr: ClassVar[float] = 1e-3

    def encode(self, rows: Examples, loaded: Loaded, config: RunConfig, run: Run, prefix: str = "") -> Examples:
        """Pixel values [channels, height, width] float32 as the model's processor makes them."""
        pixels: Any = _Processed(rows.columns["image"], loaded.processor)
        first = pixels[0]
        if first.nbytes * len(rows) <= _IN_MEMORY:
            kept = np.empty((len(rows), *first.shape), dtype=np.float32)
            for i in range(len(rows)):
                kept[i] = pixels[i]
            pixels = kept
        columns: dict[str, Any] = {"pixel_values": pixels}
        if "label" in rows.columns:
            columns[LABELS] = np.asarray(rows.columns["label"], dtype=np.int64)
        return Examples(columns)

    def stack(self, prefix: str, items: Sequence[Mapping[str, Any]]) -> Batch:
        """Stack images, which all have the processor's size."""
        return {"pixel_values": torch.from_numpy(np.stack([item["pixel_values"] for item in items]))}
