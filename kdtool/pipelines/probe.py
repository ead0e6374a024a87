"""Inputs to compare two forms of a model on: real rows where data is named, else made ones."""

from typing import Any

import numpy as np

from kdtool.config import RunConfig
from kdtool.data.examples import Examples
from kdtool.models import Loaded
from kdtool.pipelines.setup import get_data
from kdtool.run import Run
from kdtool.tasks._base import Batch, Task

_ROWS = 4
_TEXTS = [
    "a short line",
    "What is the fee for sending money to another country, and how long does it take to arrive?",
    "once upon a time there was a little girl who loved to play outside in the park with her dog",
    "yes",
]


def probe_inputs(task: Task, loaded: Loaded, config: RunConfig, run: Run) -> Batch:
    """A small batch of inputs of several lengths.

    With `--data` the first test rows; otherwise fixed sentences, or seeded noise for images and audio.
    """
    if config.data.source is not None:
        rows = get_data(config, task, run, score_only=True).test
        rows = rows.select(range(min(_ROWS, len(rows))))
        return task.example_inputs(task.encode(rows, loaded, config, run), min(_ROWS, len(rows)))
    return task.example_inputs(task.encode(_made(task, run.seed), loaded, config, run), _ROWS)


def _made(task: Task, seed: int) -> Examples:
    generator = np.random.default_rng(seed)
    columns: dict[str, Any] = {}
    if "text" in task.columns:
        # language models cut joined text into windows, so they need more of it
        columns["text"] = _TEXTS if task.classifies else [" ".join(_TEXTS)] * 64
    if "image" in task.columns:
        from PIL import Image

        columns["image"] = [
            Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(_ROWS)
        ]
    if "audio" in task.columns:
        columns["audio"] = [
            {"array": generator.normal(0, 0.1, 8000 + 1600 * i).astype(np.float32), "sampling_rate": 16000}
            for i in range(_ROWS)
        ]
    return Examples(columns)
