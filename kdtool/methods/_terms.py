"""Methods that add weighted terms to the cross-entropy, all from one forward pass of each model.

Writing such a method means naming its taps, building its helper modules once their shapes are
known, and returning its terms. Because terms do not run the models themselves, any number of them
can be combined (`--method combine`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kdtool.data.examples import Examples
from kdtool.divergences import Divergence, Measure, Teacher, TopK, compare_all, cross_entropy
from kdtool.features import taps
from kdtool.methods import _base
from kdtool.tasks._base import ROWS, Batch
from kdtool.train.parallel import gather_units, places


@dataclass(frozen=True, slots=True)
class TermConfig:
    """Settings that every method of terms has."""

    ce_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross-entropy with the labels."""
    delay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of training before the terms set in."""
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of training over which the terms then rise linearly to their weights."""


@dataclass(slots=True)
class Side:
    """What one model says of a batch.

    Attributes:
        logits: [units, classes], any float type.
        taps: Tap name to activation, as the module gave it.
        model: The model itself, for its head.
    """

    logits: Tensor
    taps: Mapping[str, Tensor] = field(default_factory=dict)
    model: Any = None


@dataclass(frozen=True, slots=True)
class Term:
    """One addend of the loss.

    Attributes:
        name: As logged.
        weight: Its factor.
        value: Scalar sum over units, not weighted; carries the gradient.
    """

    name: str
    weight: float
    value: Tensor


@dataclass(frozen=True, slots=True)
class Measured:
    """An addend that compares next-token distributions and needs nothing else.

    Attributes:
        name: As logged.
        weight: Its factor.
        measure: What compares.
        factor: Of its value, logged with it; such as T^2.
    """

    name: str
    weight: float
    measure: Measure
    factor: float = 1.0


def ramped(progress: float, delay: float, ramp: float) -> float:
    """Factor of the terms' weights at a share of training: 0, then rising, then 1."""
    if progress < delay:
        return 0.0
    return min(1.0, (progress - delay) / ramp) if ramp else 1.0


class TermMethod(_base.Method):
    """Base of methods made of terms."""

    student_taps: Sequence[str] = ()
    teacher_taps: Sequence[str] = ()
    """Names of taps; set in `__init__` where they depend on settings."""
    combinable: ClassVar[bool] = True
    """False if `combine` cannot take the terms, because the method changes what is saved."""
    needs_rows: ClassVar[bool] = False
    """True if terms look up `batch["cache.rows"]`."""
    by_chunks: bool = False
    """Whether language models are compared some tokens at a time."""

    def terms(self, student: Side, teacher: Side | None, labels: Tensor, batch: Batch, progress: float) -> list[Term]:
        """The addends besides the cross-entropy.

        Args:
            student: Its logits and taps, with gradient.
            teacher: The same, detached; None without a teacher.
            labels: [units] class ids.
            batch: The batch, for what else it holds.
            progress: Share of training done, 0 to 1.
        """
        raise NotImplementedError

    def measures(self, progress: float) -> list[Measured] | None:
        """The same addends for language models, compared some tokens at a time; None where that cannot be.

        With them no logits [tokens, vocabulary] are held as a whole, see `kdtool.divergences`.
        """
        return None

    @classmethod
    def chunk(cls, config: Any) -> int | None:
        """As many as the measures take, where there are such."""
        return None if cls.measures is TermMethod.measures else 0

    def build(self, student: Side, teacher: Side | None, data: Examples) -> None:
        """Make helper modules, knowing the shapes of a first batch; by default there are none."""

    def setup(self, batch: Batch, data: Examples) -> None:
        """Run both models once without gradient and let `build` see the shapes, unless nothing is to be seen."""
        models = [self.student, *(teacher.model for teacher in self.teacher_list)]
        self.by_chunks = self.measures(0.0) is not None and all(self.task.has_states(model) for model in models)
        if self.by_chunks:
            return
        training = self.student.training
        self.student.eval()
        with torch.no_grad():
            student, _ = self.see(batch)
            self.build(student, self.hear(batch), data)
        self.student.train(training)

    def see(self, batch: Batch) -> tuple[Side, Tensor]:
        """The student's side and the labels."""
        out_labels: Tensor
        with taps(self.student, self.student_taps, self._classes(self.student)) as values:
            out = self.task.forward(self.student, batch)
        out_labels = _base.labels_of(out)
        return Side(out.logits, values, self.student), out_labels

    def hear(self, batch: Batch) -> Side | None:
        """The first teacher's side, detached; None without a teacher."""
        if not self.teacher_list:
            return None
        model = self.teacher_list[0].model
        if not self.teacher_taps:
            return Side(self.teach(batch).logits, {}, model)
        with taps(model, self.teacher_taps, self._classes(model)) as values:
            out = self.teach(batch, cached=False)
        return Side(out.logits, values, model)

    @staticmethod
    def _classes(model: Any) -> int:
        return int(getattr(model.config, "num_labels", 0) or 0)

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Cross-entropy and all terms, each logged apart."""
        if self.by_chunks:
            return self.compare(batch, progress)
        student, labels = self.see(batch)
        teacher = self.hear(batch) if self.reads_teacher else None
        if teacher is not None and not self.task.classifies:
            size = self.common(student.logits.shape[-1], teacher.logits.shape[-1])
            student.logits, teacher.logits = student.logits[..., :size], teacher.logits[..., :size]
        return self.add_up(student, teacher, labels, batch, progress)

    def common(self, own: int, theirs: int) -> int:
        """Size of the vocabulary of both, for heads of so many rows; heads of one size are padded alike, if at all."""
        if own == theirs or not self.teacher_list:
            return min(own, theirs)
        tokenizers = (self.student_loaded.processor, self.teacher_list[0].processor)
        return min(own, theirs, *map(len, tokenizers))

    def told_at(self) -> float | None:
        """The temperature of all measures, where they have one and it stays as it is."""
        found = [term.measure for share in (0.0, 1.0) for term in self.measures(share) or ()]
        degrees = {measure.temperature if isinstance(measure, Divergence) else None for measure in found}
        return degrees.pop() if len(degrees) == 1 and self.task.has_states(self.student) else None

    def compare(self, batch: Batch, progress: float) -> _base.Losses:
        """`step` of language models, from hidden states."""
        cfg = self.config
        found = self.measures(progress)
        assert found is not None
        own = self.task.states(self.student, batch)
        factor = ramped(progress, cfg.delay, cfg.ramp)
        terms = [(term.measure, factor * term.weight * term.factor) for term in found]
        told = self.tell(batch)
        shared = None if isinstance(told, TopK) else self.common(len(own.head.weight), _width(told))
        total, sums = compare_all(own.hidden, own.head, told, own.labels, terms, cfg.ce_weight, vocabulary=shared)
        parts = {"ce": sums[0]} if cfg.ce_weight else {}
        parts |= {term.name: term.factor * value for term, value in zip(found, sums[1:], strict=True)}
        return _base.Losses(total, len(own.hidden), parts)

    def add_up(
        self, student: Side, teacher: Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> _base.Losses:
        """Sum what was seen into one loss."""
        cfg = self.config
        found = self.terms(student, teacher, labels, batch, progress)
        factor = ramped(progress, cfg.delay, cfg.ramp)
        parts: dict[str, Tensor] = {}
        total = student.logits.new_zeros((), dtype=torch.float32)
        if cfg.ce_weight:
            ce = cross_entropy(student.logits, labels)
            total, parts["ce"] = total + cfg.ce_weight * ce, ce.detach()
        for term in found:
            # a term whose weight is still 0 stays in the graph, so that its helpers have gradients
            total = total + (factor * term.weight) * term.value
            parts[term.name] = term.value.detach()
        return _base.Losses(total, student.logits.shape[0], parts)


def _width(told: Teacher) -> int:
    """Size of the vocabulary that a teacher is told in."""
    if isinstance(told, tuple):
        return len(told[1].weight)
    assert isinstance(told, Tensor)
    return told.shape[-1]


def over_everyone(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
    """A loss that couples examples, over those of all processes, so that several are one with the whole batch.

    Every process computes the whole loss, with the gradient of its own examples; only its share of the value counts.

    Args:
        loss: Of student [N, C_s] and teacher [N, C_t], a sum over N examples.
        student: [n, C_s] of this process. C_s and C_t may differ between processes, as lengths do: zeros fill up.
        teacher: [n, C_t] of this process.
        batch: The batch; its row numbers tell examples that a process without any of its own took from another.
    """
    everyone, _ = gather_units(_filled(student))
    if len(everyone) == len(student):
        return loss(student, teacher)
    others, _ = gather_units(_filled(teacher))
    rows, begin = gather_units(rows_of(batch).to(student.device))
    place, _ = gather_units(places(len(student), student.device))
    fresh = ~(rows[:, None] == rows).tril(-1).any(1)
    mine = fresh[begin : begin + len(student)].sum()
    order = torch.argsort(place[fresh])
    value = loss(everyone[fresh][order], others[fresh][order])
    return value - value.detach() * (1 - mine / fresh.sum())


def _filled(own: Tensor) -> Tensor:
    """Rows of [n, C] filled up with zeros to the widest of all processes."""
    widths, _ = gather_units(torch.tensor([own.shape[1]], device=own.device))
    return functional.pad(own, (0, int(widths.max()) - own.shape[1]))


def rows_of(batch: Batch) -> Tensor:
    """Numbers of the batch's rows in the training data, [batch]."""
    return batch[ROWS]
