"""SimKD: the student keeps its teacher's classifier and learns only the features before it.

    sum over examples of mean over channels and positions of (P(F_s) - F_t)^2

(equation 3 of the paper). P is a projector of three convolutions with batch norm. There is no
cross-entropy by default; the logits are the teacher's linear layer on the mean of P(F_s). Student,
projector and that layer are saved together as one model.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from kdtool.data.examples import Examples
from kdtool.errors import ConfigProblem
from kdtool.features import POOLED, as_map, as_vector, head_of, resolve_tap
from kdtool.methods import _base, _maps, _terms
from kdtool.modeling.simkd import Projector, SimKDConfig, assemble, pooled_to
from kdtool.models import Loaded
from kdtool.tasks._base import Batch, Task


@_maps.full_precision
def simkd_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of each example, summed over examples; the larger map is pooled to the smaller.

    Args:
        projected: P(F_s) [N, C_t, H, W].
        teacher: F_t [N, C_t, H', W'], detached.
    """
    s, t = _maps.same_size(projected, teacher)
    return (s - t).square().mean((1, 2, 3)).sum()


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    feature_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distance of features."""
    ce_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the cross-entropy of the student through the teacher's classifier."""
    factor: Annotated[int, Field(ge=1)] = 2
    """The projector is the teacher's width divided by this inside."""
    student_tap: str | None = None
    """Tap of the student; empty for the last stage of a convolutional network, else `pooled`."""
    teacher_tap: str | None = None
    """Tap of the teacher; empty for its last stage where its head reads the mean of that, else `pooled`."""


class Method(_terms.TermMethod):
    """SimKD: the student keeps its teacher's classifier and learns only the features before it."""

    paper: ClassVar[str] = (
        "Chen et al.: Knowledge Distillation with the Reused Teacher Classifier, 2022, arXiv:2203.14001"
    )
    tasks: ClassVar[frozenset[str]] = frozenset(
        {"text-classification", "image-classification", "audio-classification", "tabular-classification"}
    )
    mixes: ClassVar[bool] = True
    minimum: ClassVar[str] = "the projector starts at random"
    combinable: ClassVar[bool] = False

    def __init__(self, config: Config, student: Loaded, teachers: Sequence[Loaded], task: Task) -> None:
        super().__init__(config, student, teachers, task)
        self.student_taps = (POOLED, "-1") if config.student_tap is None else (config.student_tap,)
        self.teacher_taps = (POOLED, "-1") if config.teacher_tap is None else (POOLED, config.teacher_tap)

    def build(self, student: _terms.Side, teacher: _terms.Side | None, data: Examples) -> None:
        """Choose the taps by the shapes found, make the projector, and retire the student's own head."""
        assert teacher is not None
        first, last = self.student_taps[0], self.student_taps[-1]
        self.tap = last if student.taps[last].ndim == 4 else first
        self.target = self._target(teacher)
        if student.taps[self.tap].ndim == 3 and self.task.name != "image-classification":
            raise ConfigProblem("simkd cannot project padded sequences", hint="leave method.student_tap empty")
        s, t = as_map(student.taps[self.tap]), as_map(teacher.taps[self.target])
        self.map_size = [min(a, b) for a, b in zip(s.shape[2:], t.shape[2:], strict=True)]
        self.widths = s.shape[1], max(1, t.shape[1] // self.config.factor), t.shape[1]
        self.project = Projector(*self.widths)
        self.head_path, own = head_of(self.student, student.logits.shape[-1])
        for parameter in own.parameters():
            parameter.requires_grad_(False)
            parameter.kept_frozen = True  # type: ignore[attr-defined] # the loop frees no such parameter

    def _target(self, teacher: _terms.Side) -> str:
        """The teacher's tap: maps serve where their mean is what its head reads.

        Raises:
            ConfigProblem: a tap was asked for that does not serve.
        """
        wanted = self.teacher_taps[1]
        if _feeds_head(teacher, wanted):
            return wanted
        if self.config.teacher_tap not in (None, POOLED):
            raise ConfigProblem(
                f"method.teacher_tap: the teacher's head does not read the mean of '{wanted}'",
                hint="leave method.teacher_tap empty",
            )
        return POOLED

    def add_up(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> _base.Losses:
        """The loss, with the student's logits from the teacher's classifier."""
        assert teacher is not None
        projected = self.project(pooled_to(as_map(student.taps[self.tap]), self.map_size))
        _, head = head_of(teacher.model, teacher.logits.shape[-1])
        logits = functional.linear(projected.mean((2, 3)), head.weight, head.bias)
        side = _terms.Side(logits, {"projected": projected}, student.model)
        return super().add_up(side, teacher, labels, batch, progress)

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The distance of features."""
        assert teacher is not None
        value = simkd_loss(student.taps["projected"], as_map(teacher.taps[self.target]))
        return [_terms.Term("feature", self.config.feature_weight, value)]

    def finish(self) -> nn.Module:
        """Student, projector and the teacher's classifier as one model."""
        model: Any = self.student
        teacher: Any = self.teacher_list[0].model
        _, head = head_of(teacher, int(teacher.config.num_labels))
        backbone = copy.deepcopy(model.config)
        backbone._name_or_path = ""  # a path of this machine, no part of the model
        config = SimKDConfig(
            backbone_config=backbone,
            head_path=self.head_path,
            tap=POOLED if self.tap == POOLED else resolve_tap(model, self.tap),
            map_size=list(self.map_size),
            in_width=self.widths[0],
            mid_width=self.widths[1],
            out_width=self.widths[2],
            id2label=dict(model.config.id2label),
            label2id=dict(model.config.label2id),
        )
        student: nn.Module = assemble(config, self.task.auto_class, model, self.project, head)
        student.train(model.training)
        return student


def _feeds_head(side: _terms.Side, point: str) -> bool:
    """Whether the mean of a map is what reaches the head."""
    value, pooled = side.taps[point], side.taps[POOLED]
    fits = value.ndim == 4 and value.shape[1] == pooled.shape[-1]
    return fits and torch.allclose(as_vector(value), pooled, atol=1e-4)
