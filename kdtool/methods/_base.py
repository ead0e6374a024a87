"""What a distillation method is: an nn.Module that owns everything that trains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdtool.authors import Author
from kdtool.data.examples import DataSplits, Examples
from kdtool.divergences import Teacher as Told
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.sections import RunConfig, TrainSection
from kdtool.tasks._base import VIEW, Batch, Outputs, Task, view_of
from kdtool.teacher_cache import TeacherCache
from kdtool.train.optim import build_optimizer


@dataclass(frozen=True, slots=True)
class Losses:
    """What a step returns: sums and counts, so that any split into micro-batches adds up.

    Attributes:
        total: Scalar, sum of the loss over units (examples or tokens); carries the gradient.
        count: Number of units summed; the loop divides once per optimiser step.
        parts: Detached sums of the named terms, for the log.
        units: How many units those parts are over that are not over all; a part without any is left out of the log.
    """

    total: Tensor
    count: Tensor | int
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    units: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of training with its own trainable parameters.

    Attributes:
        name: Shown in logs and checkpoints.
        share: Share of all steps.
        trains: Decides by parameter name (as in `Method.named_parameters`) what trains.
    """

    name: str = "train"
    share: float = 1.0
    trains: Callable[[str], bool] = field(default=lambda _: True)


@dataclass(frozen=True, slots=True)
class Work:
    """What `Method.prepare` may use.

    Attributes:
        folder: Files in it are kept with the result, in its folder `data`.
        config: The run's configuration.
        run: Context.
        author: Gives the teacher as a writer of texts; loads it, or asks whether the endpoint is there.
        writer: Makes a writer of a language model, which sees prompts as they are in training.
        fit: From the reference of a model, raw rows, training settings and a name to the model trained on them by
            the normal loop, on the labels alone; resumable, and kept under that name until the run is done.
        facts: What was done, stage by stage; goes to the manifest.
    """

    folder: Path
    config: RunConfig
    run: Run
    author: Callable[[], Author]
    writer: Callable[[Loaded], Author]
    fit: Callable[[str, Examples, TrainSection, str], Loaded]
    facts: dict[str, Any] = field(default_factory=dict)


class Method(nn.Module):
    """Base of all methods.

    A subclass sets `paper` and `tasks` as literals (they are read without importing the file) and
    implements `step`. Frozen teachers are kept outside the module tree: never in `state_dict()`,
    never trained, always in eval mode.
    """

    paper: ClassVar[str] = ""
    tasks: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[str] = ""
    """What the tasks it leaves out do not have, such as feature maps; said when it is asked for one of them."""
    teachers: ClassVar[tuple[int, int]] = (1, 1)
    """Fewest and most teachers."""
    reads_teacher: ClassVar[bool] = True
    """False if the loss never asks the teacher, or trains it."""
    mixes: ClassVar[bool] = False
    """True if the loss takes labels [units, classes], as mixup and CutMix make them."""
    cacheable: ClassVar[bool] = True
    """False if the teacher never answers rows of the data alone, so that a teacher cache would stay empty."""
    packs: ClassVar[bool] = True
    """False if a step needs each example of a language model in a row of its own, such as to go on from it."""
    batchwise: ClassVar[bool] = False
    """True if the loss couples the samples of a batch."""
    golden: ClassVar[str] = ""
    """Why no golden test names the method; empty where one does (tests/contract asks for either)."""

    def __init__(self, config: Any, student: Loaded, teachers: Sequence[Loaded], task: Task) -> None:
        super().__init__()
        self.config = config
        self.task = task
        self.student = student.model
        self.student_loaded = student
        self.teacher_list: list[Loaded] = list(teachers)
        self.caches: dict[int, TeacherCache] = {}
        for teacher in self.teacher_list:
            teacher.model.eval().requires_grad_(False)

        self.steps = 1
        """Steps of the whole training, once it has begun."""
        self.folder: Path | None = None
        """Where it may leave files that belong to the result; they stay there while a run is interrupted."""
        self.held_out: Examples | None = None
        """Encoded rows for choices during training; None where the data has none for it."""

    teacher_writes: ClassVar[bool] = False
    """True if a teacher that gives only texts will do, an endpoint or a file; `prepare` makes its texts the data."""
    metrics: ClassVar[tuple[str, ...]] = ()
    """What its students are measured by where nothing is asked for (default: what the task measures)."""
    loads_teacher: ClassVar[bool] = True
    """False if only `prepare` asks the teacher, which is loaded there when it has something to write."""

    needs_rows: ClassVar[bool] = False
    """True if a step looks up `batch["cache.rows"]`, the numbers of its rows in the training data."""

    def prepare(self, data: DataSplits, work: Work) -> DataSplits:
        """Make the data to train on, once: annotations, rationales, texts of the teacher; by default the data as it is.

        Everything made goes to files in `work.folder`, row by row, with the provenance of each row, so that an
        interrupted run goes on where it stopped. Test rows stay as they are.

        Args:
            data: Raw data with columns named by role.
            work: What it may use.
        """
        return data

    @classmethod
    def chunk(cls, config: Any) -> int | None:
        """How many tokens of a language model with a plain head it compares at once, see `kdtool.divergences`.

        Args:
            config: Its settings.

        Returns:
            None for all, so that whole logits [tokens, vocabulary] are held; 0 for as many as the device likes.
        """
        return None

    def setup(self, batch: Batch, data: Examples) -> None:
        """See a first batch and the training rows before training; by default nothing is learnt from them."""

    def stages(self) -> Sequence[Stage]:
        """Stages in order; one by default."""
        return (Stage(),)

    def enter(self, stage: str, resumed: bool) -> None:
        """A stage begins, or goes on after an interruption; by default nothing happens.

        Args:
            stage: Its name.
            resumed: True if some of its steps were done before, and `state_dict()` is as it was then.
        """

    def optimizer(self, groups: list[dict[str, Any]], config: TrainSection, device: str) -> torch.optim.Optimizer:
        """The update rule of a stage, built when it begins; by default the one that the configuration names.

        Args:
            groups: Trainable parameters, with the `lr` and `weight_decay` of each group.
            config: Optimisation settings.
            device: Where the parameters are.
        """
        return build_optimizer(groups, config, device)

    def before_step(self, step: int) -> None:
        """An optimiser step begins, counted from 0 over all stages; by default nothing happens."""

    def cautions(self, epochs: float) -> Sequence[str]:
        """What the user should know of these settings with this length of training, one line each."""
        return ()

    @torch.no_grad()
    def teach(self, batch: Batch, index: int = 0, cached: bool = True) -> Outputs:
        """Outputs of a frozen teacher, detached; from its cache where there is one.

        Cached outputs carry no labels.
        """
        if cached and index in self.caches and VIEW in batch:
            logits = self.caches[index].get(batch[VIEW])
            assert isinstance(logits, Tensor), "a cache of the likeliest tokens is for methods that say told_at"
            return Outputs(logits, None)
        return self.task.forward(self.teacher_list[index].model, view_of(batch, index))

    def told_at(self) -> float | None:
        """Temperature at which the likeliest tokens alone can stand for the teacher; None where they cannot.

        A method that says one asks `tell` alone, and can be made without a teacher.
        """
        return None

    @torch.no_grad()
    def tell(self, batch: Batch, index: int = 0) -> Told:
        """What a frozen language model says of the units, in the form that takes least; see `kdtool.divergences`."""
        if index in self.caches and VIEW in batch:
            return self.caches[index].get(batch[VIEW])
        there = self.task.states(self.teacher_list[index].model, view_of(batch, index))
        return there.hidden, there.head

    def step(self, batch: Batch, progress: float) -> Losses:
        """Loss of one micro-batch.

        Args:
            batch: What the task's collate made, on the right device.
            progress: Share of training done, 0 to 1.
        """
        raise NotImplementedError

    def forward(self, batch: Batch, progress: float) -> Losses:
        """`step`, so that data-parallel wrappers can hook it."""
        return self.step(batch, progress)

    def finish(self) -> nn.Module:
        """The model to save: by default the student as it is."""
        return self.student


def labels_of(out: Outputs) -> Tensor:
    """Labels of a training batch, which always carries them."""
    assert out.labels is not None, "a training batch without labels"
    return out.labels
