"""What a task is: it hides the modality from methods, loop and proof."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from kdtool.data.examples import Examples
from kdtool.divergences import Head
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.sections import AugmentSection, RunConfig

Batch = dict[str, Tensor]

LABELS = "labels"
"""Batch key of the class ids."""

ROWS = "cache.rows"
"""Batch key of the numbers of the batch's rows in the training data, where a teacher cache is used."""

VIEW = "cache.views"
"""Batch key beside it: numbers by which a teacher cache knows the rows, those of their views where they are altered."""

TEACHER_PREFIX = "teacher"
"""Batch keys `teacher0.input_ids` hold inputs made by the processor of teacher 0."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a forward pass gives, under fixed names.

    A unit is an example for classifiers and a predicted token for language models; positions that
    do not count (padding, prompts) are dropped before, so that a logit method is written once.

    Attributes:
        logits: [units, classes]
        labels: [units] int64 class ids, or [units, classes] probabilities where images were mixed; None
            where the batch has none.
    """

    logits: Tensor
    labels: Tensor | None


@dataclass(frozen=True, slots=True)
class States:
    """What a language model's head turns into logits, of the units that count.

    Attributes:
        hidden: [units, width]
        head: The head.
        labels: [units] int64 token ids.
    """

    hidden: Tensor
    head: Head
    labels: Tensor


@dataclass(slots=True)
class Evaluation:
    """Result of scoring a model.

    Attributes:
        metrics: Name to value.
        errors: Name to standard error, where known.
        logits: [examples, classes] float32 for classifiers, else None.
        labels: [examples] int64 for classifiers, else None.
        examples: Number of examples scored.
        predictions: [units] the classes or tokens ranked first, row by row; None where unknown.
        units: [examples] number of units of each row beside them.
    """

    metrics: dict[str, float]
    errors: dict[str, float]
    logits: np.ndarray | None
    labels: np.ndarray | None
    examples: int
    predictions: np.ndarray | None = None
    units: np.ndarray | None = None


class Task:
    """Base of all tasks; one instance serves one run.

    Subclasses set the class attributes as literals.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    """Name of the transformers Auto class that loads models of this task."""
    processor_class: ClassVar[str]
    """Name of the transformers Auto class that loads what makes the inputs."""
    columns: ClassVar[tuple[str, ...]]
    """Roles a data set must fill, out of those in `kdtool.data.columns` and features."""
    other_columns: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Sets of roles that do instead of them."""
    optional_columns: ClassVar[tuple[str, ...]] = ()
    metrics: ClassVar[tuple[str, ...]]
    """Default metrics; the first is the main one."""
    default_lr: ClassVar[float] = 1e-4
    writes: ClassVar[bool] = False
    """True if models of this task write texts, which metrics can compare."""
    classifies: ClassVar[bool] = True
    """True if units are examples with one class each."""

    def fit_processor(self, rows: Examples | None, config: RunConfig, run: Run) -> Any:
        """What makes the inputs, learnt from raw training rows; None for tasks whose models bring it along."""
        return None

    def remember(self, loaded: Loaded, config: RunConfig) -> None:
        """Be ready for rows in the tokens of a model; `encode` calls it. Nothing for tasks that read no tokens back."""

    def model_values(self, processor: Any) -> dict[str, Any]:
        """What a processor says of a model's configuration, such as the number of inputs."""
        return {}

    def encode(self, rows: Examples, loaded: Loaded, config: RunConfig, run: Run, prefix: str = "") -> Examples:
        """Turn raw rows into model inputs (token ids, pixel values), once, with lengths for bucketing.

        Args:
            rows: Raw rows, columns named by role.
            loaded: Model and processor that the inputs are for.
            config: The run's configuration.
            run: Context.
            prefix: Empty for the student, `teacherN.` for a teacher with a processor of its own.
        """
        raise NotImplementedError

    def views(self, rows: Examples, settings: AugmentSection) -> Any:
        """What makes training rows of this task differ from epoch to epoch, a `kdtool.tasks._views.Views`, or None."""
        return None

    def shares_inputs(self, student: Loaded, teacher: Loaded) -> bool:
        """Whether a teacher with another processor takes the student's inputs all the same."""
        return False

    def encode_apart(self, rows: Examples, student: Loaded, teacher: Loaded, config: RunConfig, run: Run) -> Examples:
        """Inputs of a language model, and beside them those of a teacher with another tokenizer."""
        raise NotImplementedError

    def packed(self, rows: Examples, models: Sequence[nn.Module]) -> Examples | None:
        """Encoded training rows that `collate` puts side by side, for models that keep them apart.

        Returns:
            The rows; None where the task has no such rows, or a model cannot.
        """
        return None

    def collate(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad and stack encoded examples."""
        raise NotImplementedError

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run a model on a batch."""
        raise NotImplementedError

    def units(self, batch: Batch) -> Tensor:
        """How many units each example of a language model's batch has, [examples] int64; `forward` keeps the order."""
        raise NotImplementedError

    def lines(self, batch: Batch) -> Batch:
        """Rows of prompt and response as models that write see them, token ids and labels; by default the batch."""
        return batch

    def has_states(self, model: nn.Module) -> bool:
        """Whether `states` can take the place of `forward`, so that no logits need be held as a whole."""
        return False

    def states(self, model: nn.Module, batch: Batch) -> States:
        """Run the body of a language model on a batch."""
        raise NotImplementedError

    def evaluate(
        self,
        model: nn.Module,
        data: Examples,
        run: Run,
        metrics: Sequence[str],
        batch_size: int,
        teacher: int | None = None,
    ) -> Evaluation:
        """Score a model.

        Args:
            model: Student or teacher, on the run's device.
            data: Encoded rows with labels.
            run: Context.
            metrics: Names of metrics.
            batch_size: Rows in one forward pass; does not change the result beyond rounding.
            teacher: Number of the teacher whose inputs to use, None for the student's.
        """
        raise NotImplementedError

    def example_inputs(self, data: Examples, batch_size: int, teacher: int | None = None) -> Batch:
        """A batch of real inputs, without labels, for latency and parity checks."""
        raise NotImplementedError


def to_device(batch: Batch, device: str | torch.device) -> Batch:
    """Move a batch; a no-op on the CPU."""
    if str(device) == "cpu":
        return batch
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def view_of(batch: Batch, index: int) -> Batch:
    """The part of a batch made for teacher `index`, or the batch itself where both share inputs."""
    prefix = f"{TEACHER_PREFIX}{index}."
    own = {key.removeprefix(prefix): value for key, value in batch.items() if key.startswith(prefix)}
    return own or batch
