"""What a method needs to take a step, for each task: loaded models and encoded rows."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdtool.config import load_config
from kdtool.data.examples import Examples
from kdtool.models import Loaded, load_model
from kdtool.pipelines.setup import encode, get_data, load_processor
from kdtool.registry import METHODS, TASKS
from kdtool.run import Run
from kdtool.sections import RunConfig
from kdtool.tasks._base import ROWS, Batch, Task

PARTS = {
    "text-classification": ("bert", "bert-small", "pairs"),
    "image-classification": ("vit", "vit-small", "images"),
    "audio-classification": ("wav2vec", "wav2vec-small", "audio"),
    "tabular-classification": ("tabular", "tabular-small", "table"),
    "causal-lm": ("llama", "llama-small", "plain"),
    "seq2seq-lm": ("t5", "t5-small", "prompts"),
    "masked-lm": ("masked", "masked-small", "plain"),
}
"""Task to teacher, student (see `models` in conftest) and data."""

OPTIONS = {"causal-lm": ["data.max_length=8"]}


@dataclass
class Kit:
    """Models and rows of one task; `build` gives fresh copies."""

    task: Task
    teacher: Loaded
    student: Loaded
    train: Examples
    test: Examples
    config: RunConfig

    def build(self, name: str, same: bool = False, **values: Any) -> Any:
        """A method with its own copies of student and teacher, or of the teacher twice with `same`."""
        fewest, most = METHODS.info(name).facts.get("teachers", (1, 1))
        teachers = [self.copy(self.teacher) for _ in range(min(max(1, fewest), most))]
        student = self.copy(self.teacher if same else self.student)
        if name == "combine":
            values.setdefault("terms", ["kd:1"])
        method = METHODS.get(name)(METHODS.build_config(name, values), student, teachers, self.task)
        method.setup(self.batch([0, 1]), self.train)
        return method

    def copy(self, loaded: Loaded) -> Loaded:
        model = copy.deepcopy(loaded.model)
        return Loaded(model, loaded.processor, loaded.ref, None, loaded.folder, dict(loaded.facts))

    def batch(self, rows: list[int]) -> Batch:
        batch = self.task.collate([self.train[i] for i in rows])
        return batch | {ROWS: torch.tensor(rows)}


def make_kit(
    task_name: str,
    models: Callable[[str], Path],
    data: Callable[[str], Path],
    source: str | None = None,
    pair: tuple[str, str] | None = None,
) -> Kit:
    """The kit of a task, on the data named `source` and with models of these names instead of the task's usual ones."""
    assert task_name in PARTS, f"tests/kits.py has no tiny models and data for the task {task_name}: add them to PARTS"
    teacher_name, student_name, data_name = PARTS[task_name]
    overrides = [f"data.task={task_name}", *(OPTIONS.get(task_name, []) if source is None else [])]
    config = load_config("distill", None, overrides, {"data.source": str(data(source or data_name))})
    run = Run(offline=True)
    task: Task = TASKS.get(task_name)()
    rows = get_data(config, task, run)
    loaded = []
    for name in pair or (teacher_name, student_name):
        one = load_model(str(models(name)), task.auto_class, run)
        load_processor(one, task, run)
        loaded.append(one)
    encoded = encode(task, rows, loaded[1], loaded[0], config, run)
    assert encoded.train is not None
    return Kit(task, loaded[0], loaded[1], encoded.train, encoded.test, config)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by parameter name."""
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
