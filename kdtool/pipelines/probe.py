"""Inputs to compare two forms of a model on: real rows where data is named, else made ones."""

from typing import Any

import numpy as np
import torch

from kdtool.data.examples import Examples
from kdtool.models import Loaded
from kdtool.pipelines.lengths import sequence
from kdtool.pipelines.setup import get_data
from kdtool.run import Run
from kdtool.sections import RunConfig
from kdtool.tasks._base import Batch, Task

_ROWS = 4
_WINDOWS = 6
_REAL_ROWS = 32
_TEXTS = [
    "a short line",
    "What is the fee for sending money to another country, and how long does it take to arrive?",
    "once upon a time there was a little girl who loved to play outside in the park with her dog",
    "yes",
]


def probe_batches(task: Task, loaded: Loaded, config: RunConfig, run: Run, length: int | None = None) -> list[Batch]:
    """Batches of several shapes, each of real inputs.

    The first holds all rows, padded to the longest; then come single rows of several lengths, which
    need no padding, and a pair. Language models get windows of several lengths.

    With `--data` the rows are the first of the test rows (up to 32); otherwise fixed sentences, or
    seeded noise for images and audio.

    With a `length` in tokens all inputs have it: rows joined and cut, some padded.
    """
    if config.data.source is not None:
        rows = get_data(config, task, run, score_only=True).test
        rows = rows.select(range(min(_REAL_ROWS, len(rows))))
    else:
        rows = _made(task, loaded, run.seed)
    encoded = task.encode(rows, loaded, config, run)
    if length is not None:
        return _of_length(task, encoded, length, run.seed)
    count = min(len(encoded), _REAL_ROWS if config.data.source is not None else _ROWS)
    # a graph is traced with the first batch, and a batch of one row would fix the number of rows
    batches = [task.example_inputs(encoded, max(2, count))]
    lengths = encoded.lengths
    order = list(range(count)) if lengths is None else sorted(range(count), key=lambda i: int(lengths[i]))
    chosen = dict.fromkeys((order[0], order[len(order) // 2], order[-1]))
    batches += [task.example_inputs(encoded.select([row]), 1) for row in chosen]
    batches.append(task.example_inputs(encoded.select(order[:2]), 2))
    if not task.classifies:
        whole = batches[0]
        window = next(iter(whole.values())).shape[1]
        batches += [{key: value[:2, :length] for key, value in whole.items()} for length in {window // 2, 3}]
    return batches


def _of_length(task: Task, encoded: Examples, length: int, seed: int) -> list[Batch]:
    """Batches of three, one and two sequences of a length; those of classifiers end in padding where not the first."""
    batch, _ = sequence(task, encoded, _WINDOWS * length, seed)
    rows = batch["input_ids"].reshape(_WINDOWS, length)
    batches = []
    for chosen in (slice(0, 3), slice(3, 4), slice(4, 6)):
        made: Batch = {"input_ids": rows[chosen].clone()}
        if task.classifies:
            real = length - length * torch.arange(len(made["input_ids"])) // 4
            made["attention_mask"] = (torch.arange(length) < real[:, None]).long()
            made["input_ids"] *= made["attention_mask"]
        batches.append(made)
    return batches


def _made(task: Task, loaded: Loaded, seed: int) -> Examples:
    generator = np.random.default_rng(seed)
    columns: dict[str, Any] = {}
    if "text" in task.columns:
        # language models cut joined text into windows, so they need more of it
        columns["text"] = _TEXTS if task.classifies else [" ".join(_TEXTS)] * 64
    if "prompt" in task.columns:
        columns |= {"prompt": _TEXTS, "response": _TEXTS[::-1]}
    if "image" in task.columns:
        from PIL import Image

        columns["image"] = [
            Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(_ROWS)
        ]
    if "audio" in task.columns:
        rate = int(loaded.processor.sampling_rate)
        columns["audio"] = [
            {"array": generator.normal(0, 0.1, rate // 2 + i * rate // 10).astype(np.float32), "sampling_rate": rate}
            for i in range(_ROWS)
        ]
    return Examples(columns)
