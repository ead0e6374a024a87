"""What all classification tasks share: one label and one row of logits for each example."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from kdtool.data.batching import ordered_batches
from kdtool.data.examples import Examples
from kdtool.metrics import compared, score
from kdtool.run import Run
from kdtool.tasks._base import LABELS, Batch, Evaluation, Outputs, Task, to_device, view_of


class ClassificationTask(Task):
    """Base of the classification tasks; a subclass says how inputs are made and stacked."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro-f1", "nll", "ece", "brier")
    classifies: ClassVar[bool] = True

    def stack(self, prefix: str, items: Sequence[Mapping[str, Any]]) -> Batch:
        """Stack the inputs of one processor; `prefix` is empty for the student's."""
        raise NotImplementedError

    def collate(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad and stack; inputs of other processors come under `teacherN.` keys."""
        groups: dict[str, list[str]] = {}
        for key in items[0]:
            if key != LABELS:
                prefix, dot, _ = key.rpartition(".")
                groups.setdefault(prefix + dot, []).append(key)
        batch: Batch = {}
        for prefix, keys in groups.items():
            own = [{key.removeprefix(prefix): item[key] for key in keys} for item in items]
            batch |= {prefix + key: value for key, value in self.stack(prefix, own).items()}
        if LABELS in items[0]:
            batch[LABELS] = torch.from_numpy(np.array([item[LABELS] for item in items], dtype=np.int64))
        return batch

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """Logits [examples, classes] and labels [examples]."""
        inputs = {key: value for key, value in batch.items() if key != LABELS and "." not in key}
        return Outputs(model(**inputs).logits, batch.get(LABELS))

    @torch.no_grad()
    def predict(
        self, model: nn.Module, data: Examples, run: Run, batch_size: int, teacher: int | None = None
    ) -> np.ndarray:
        """Logits [examples, classes] float32 in the order of the data."""
        model.eval()
        chunks, order = [], []
        for rows in ordered_batches(data.lengths, len(data), batch_size):
            batch = to_device(self.collate([data[int(i)] for i in rows]), run.device)
            if teacher is not None:
                batch = view_of(batch, teacher)
            chunks.append(self.forward(model, batch).logits.float().cpu().numpy())
            order.append(rows)
        logits = np.concatenate(chunks)
        result = np.empty_like(logits)
        result[np.concatenate(order)] = logits
        return result

    def evaluate(
        self,
        model: nn.Module,
        data: Examples,
        run: Run,
        metrics: Sequence[str],
        batch_size: int,
        teacher: int | None = None,
    ) -> Evaluation:
        """Score a model; the result does not depend on the batch size beyond rounding."""
        logits = self.predict(model, data, run, batch_size, teacher)
        labels = np.asarray(data.columns[LABELS])
        values, errors = score([name for name in metrics if compared(name) == "logits"], logits, labels)
        ones = np.ones(len(data), dtype=np.int64)
        return Evaluation(values, errors, logits, labels, len(data), logits.argmax(1), ones)

    def example_inputs(self, data: Examples, batch_size: int, teacher: int | None = None) -> Batch:
        """A batch of real inputs without labels."""
        batch = self.collate([data[i % len(data)] for i in range(batch_size)])
        if teacher is not None:
            batch = view_of(batch, teacher)
        return {key: value for key, value in batch.items() if key != LABELS and "." not in key}
