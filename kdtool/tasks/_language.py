"""What all language models share: a unit is a predicted token, and figures are means over those that count."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdtool.data.batching import ordered_batches
from kdtool.data.examples import Examples
from kdtool.errors import DataProblem
from kdtool.metrics import Texts, compared, ratio_and_error, score_texts
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.sections import RunConfig
from kdtool.tasks import _base
from kdtool.tasks._base import LABELS, TEACHER_PREFIX, Batch, Evaluation, to_device
from kdtool.tasks._prompts import REFERENCE
from kdtool.tasks._spans import same_tokens
from kdtool.tasks._text import padding_id
from kdtool.tasks._writing import Writing, write

IGNORED = -100
"""Label of tokens that do not count, as transformers has it."""

_LARGEST = 700.0  # nats whose exponential is still a float


class LanguageTask(_base.Task):
    """Base of the tasks whose units are tokens; a subclass says how inputs are made and which tokens count."""

    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token-accuracy", "agreement")
    default_lr: ClassVar[float] = 5e-4
    writes: ClassVar[bool] = True
    classifies: ClassVar[bool] = False

    def shares_inputs(self, student: Loaded, teacher: Loaded) -> bool:
        """True if every id that both tokenizers have is the same token in both."""
        return same_tokens(student.processor, teacher.processor)

    def encode_apart(self, rows: Examples, student: Loaded, teacher: Loaded, config: RunConfig, run: Run) -> Examples:
        """Refuse: methods of this task compare token with token.

        Raises:
            DataProblem: always.
        """
        raise DataProblem(
            "teacher and student have different tokenizers", hint="choose a student with the teacher's tokenizer"
        )

    def units(self, batch: Batch) -> Tensor:
        """How many units each example of a batch has, [examples] int64; `forward` gives them in that order."""
        raise NotImplementedError

    def prompt_of(self, row: Mapping[str, Any]) -> np.ndarray:
        """What of an encoded row a model is asked to go on from."""
        raise NotImplementedError

    def remember(self, loaded: Loaded, config: RunConfig) -> None:
        """Keep what evaluation needs of tokenizer and settings."""
        self.tokenizer, self.answers = loaded.processor, config.eval.answers
        self.others: dict[int, Any] = {}
        self.padding = padding_id(loaded.processor)
        self.writing = Writing(config.eval.max_new_tokens, tuple(config.eval.stop))

    def evaluate(
        self,
        model: nn.Module,
        data: Examples,
        run: Run,
        metrics: Sequence[str],
        batch_size: int,
        teacher: int | None = None,
    ) -> Evaluation:
        """Mean loss in nats per counted token, perplexity, share of counted tokens predicted right.

        Metrics that compare texts have the model write one behind each prompt first, greedily.
        Standard errors treat rows as independent.
        """
        model.eval()
        data, tokenizer, apart = self._seen_by(data, teacher)
        sums, predictions = self._passes(model, data, run, batch_size)
        values, errors = _figures(*sums)
        named = [name for name in metrics if compared(name) == "texts"]
        if named:
            prompts = [self.prompt_of(data[i]) for i in range(len(data))]
            written = write(model, tokenizer, prompts, self.writing, batch_size, run)
            references: Any = data.columns[REFERENCE]
            found = score_texts(named, Texts(written, references, self.answers))
            values, errors = values | found[0], errors | found[1]
        chosen = [name for name in metrics if name in values]
        return Evaluation(
            {name: values[name] for name in chosen},
            {name: errors[name] for name in chosen},
            None,
            None,
            len(data),
            None if apart else predictions,
            sums[2].astype(np.int64),
        )

    def _seen_by(self, data: Examples, teacher: int | None) -> tuple[Examples, Any, bool]:
        """Rows and tokenizer of the student, or of a teacher, and whether these are the teacher's own."""
        prefix = f"{TEACHER_PREFIX}{teacher}."
        own = {name.removeprefix(prefix): column for name, column in data.columns.items() if name.startswith(prefix)}
        if teacher is None or not own:
            return data, self.tokenizer, False
        lengths = np.array([len(ids) for ids in own["input_ids"]], dtype=np.int64)
        return Examples({**own, REFERENCE: data.columns[REFERENCE]}, lengths), self.others[teacher], True

    @torch.no_grad()
    def _passes(self, model: nn.Module, data: Examples, run: Run, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Loss, hits and units of each row, [3, rows]; tokens ranked first, [units] in the order of the data."""
        sums = np.zeros((3, len(data)))
        ranked: list[np.ndarray] = [np.empty(0, dtype=np.int32)] * len(data)
        for rows in ordered_batches(data.lengths, len(data), batch_size):
            batch = to_device(self.collate([data[int(i)] for i in rows]), run.device)
            out = self.forward(model, batch)
            assert out.labels is not None
            units = self.units(batch)
            owner = torch.arange(len(rows), device=units.device).repeat_interleave(units)
            loss = functional.cross_entropy(out.logits.float(), out.labels, reduction="none").double()
            first = out.logits.argmax(-1)
            found = torch.zeros(2, len(rows), dtype=torch.float64, device=units.device)
            found.index_add_(1, owner, torch.stack([loss, (first == out.labels).double()]))
            sums[:, rows] = torch.cat([found, units.double()[None]]).cpu().numpy()
            parts = np.split(first.int().cpu().numpy(), np.cumsum(units.cpu().numpy())[:-1])
            for row, part in zip(rows, parts, strict=True):
                ranked[row] = part
        return sums, np.concatenate(ranked)

    def example_inputs(self, data: Examples, batch_size: int, teacher: int | None = None) -> Batch:
        """A batch of real rows without labels."""
        data, _, _ = self._seen_by(data, teacher)
        batch = self.collate([data[i % len(data)] for i in range(batch_size)])
        return {key: value for key, value in batch.items() if key != LABELS}


def _figures(losses: np.ndarray, hits: np.ndarray, units: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics and their standard errors from sums of each row."""
    loss, loss_error = ratio_and_error(losses, units)
    accuracy, accuracy_error = ratio_and_error(hits, units)
    perplexity = math.exp(loss) if loss < _LARGEST else math.inf
    values = {"loss": loss, "perplexity": perplexity, "token-accuracy": accuracy}
    return values, {"loss": loss_error, "perplexity": perplexity * loss_error, "token-accuracy": accuracy_error}
