"""Audio classification: one recording, one class."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from kdtool.data.examples import Examples
from kdtool.errors import UsageProblem
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.sections import RunConfig
from kdtool.tasks._base import LABELS, Batch
from kdtool.tasks._classification import ClassificationTask

_SECONDS = 10
"""Longest recording by default; longer ones are cut."""


def resample(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """A mono recording [samples] float32 at another rate in Hz."""
    if rate == wanted:
        return wave
    try:
        import soxr
    except ImportError:
        raise UsageProblem(
            f"the recordings have {rate} Hz, the model wants {wanted} Hz, and soxr is not installed",
            hint="pip install 'kdtool[audio]'",
        ) from None
    return np.asarray(soxr.resample(wave, rate, wanted), dtype=np.float32)


class Task(ClassificationTask):
    """Recordings through AutoModelForAudioClassification, resampled to the model's rate."""

    name: ClassVar[str] = "audio-classification"
    auto_class: ClassVar[str] = "AutoModelForAudioClassification"
    processor_class: ClassVar[str] = "AutoFeatureExtractor"
    columns: ClassVar[tuple[str, ...]] = ("audio", "label")
    default_lr: ClassVar[float] = 1e-4

    def __init__(self) -> None:
        self.extractors: dict[str, Any] = {}

    def encode(self, rows: Examples, loaded: Loaded, config: RunConfig, run: Run, prefix: str = "") -> Examples:
        """Waveforms [samples] float32 at the rate of the model's feature extractor."""
        extractor = loaded.processor
        self.extractors[prefix] = extractor
        rate = int(extractor.sampling_rate)
        bound = config.data.max_length or _SECONDS * rate
        waves = []
        for clip in rows.columns["audio"]:
            waves.append(resample(clip["array"], int(clip["sampling_rate"]), rate)[:bound])
        columns: dict[str, Any] = {"wave": waves}
        if "label" in rows.columns:
            columns[LABELS] = np.asarray(rows.columns["label"], dtype=np.int64)
        return Examples(columns, np.array([len(wave) for wave in waves], dtype=np.int64))

    def stack(self, prefix: str, items: Sequence[Mapping[str, Any]]) -> Batch:
        """Run the feature extractor over the batch, padded to its longest recording."""
        extractor = self.extractors[prefix]
        made = extractor(
            [item["wave"] for item in items],
            sampling_rate=int(extractor.sampling_rate),
            padding=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return dict(made)
