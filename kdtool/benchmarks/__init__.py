"""Named benchmarks: data, columns, splits and metrics in one word. One YAML file each; torch-free."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from kdtool.errors import UsageProblem, nearest

HARNESS = "lm-eval:"
"""Benchmarks of lm-evaluation-harness: the name of one of its tasks, or of a YAML file, follows."""

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What a benchmark name stands for; columns and splits that are None are guessed as for any data.

    Attributes:
        name: File name without ending.
        summary: One line.
        task: Name of the task.
        source: Shipped set, or Hub id `id[:config][@revision]`.
        text: Column with the text, or the first sentence of a pair.
        text_pair: Column with the second sentence.
        label: Column with the class.
        image: Column with the image.
        audio: Column with the audio.
        train_split: Split to train on.
        validation_split: Split for choices during training.
        test_split: Split that is scored.
        metrics: The first is the main one.
        paper: Where the data comes from.
    """

    name: str
    summary: str
    task: str
    source: str
    metrics: tuple[str, ...]
    paper: str
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    image: str | None = None
    audio: str | None = None
    train_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None

    def data_values(self) -> dict[str, str]:
        """Keys of the `data` section of a configuration and their values, for those that are set."""
        keys = ("source", "task", "text", "text_pair", "label", "image", "audio")
        splits = ("train_split", "validation_split", "test_split")
        return {key: value for key in (*keys, *splits) if (value := getattr(self, key)) is not None}


def names() -> list[str]:
    """Names of all benchmarks, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_benchmark(name: str) -> Benchmark:
    """Read a benchmark.

    Raises:
        UsageProblem: there is no benchmark of that name; the hint gives the nearest.
    """
    if name not in names():
        raise UsageProblem(f"unknown benchmark '{name}'", hint=nearest(name, names()))
    values = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return Benchmark(name=name, **{**values, "metrics": tuple(values["metrics"])})
