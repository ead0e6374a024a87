"""Softmax regression: the student's features must make the teacher's classifier say the same.

    sum over examples of mean (R(f_s) - f_t)^2 + beta * mean (W_t R(f_s) + b_t - z_t)^2

f are the vectors before the heads, W_t and b_t the teacher's frozen linear layer (equations 3 and 5
of the paper, in the form of the public code). R is trained and thrown away: a linear layer for
vectors; for maps a 1x1 convolution with batch norm and ReLU before the mean over positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from kdtool.data.examples import Examples
from kdtool.features import POOLED, head_of
from kdtool.methods import _maps, _terms
from kdtool.modeling.simkd import PatientBatchNorm
from kdtool.models import Loaded
from kdtool.tasks._base import Batch, Task


@_maps.full_precision
def row_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of rows [N, C], summed over rows; used for features and for logits."""
    return (student - teacher).square().mean(1).sum()


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    feature_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distance of features."""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distance of logits; toolboxes use 5 on CIFAR and 1 on ImageNet."""
    student_tap: str = "pooled"
    """Tap of the student: `pooled`, or a stage or module path with maps, such as -1."""


class Method(_terms.TermMethod):
    """Softmax regression: the student's features must make the teacher's classifier say the same."""

    paper: ClassVar[str] = (
        "Yang, Martinez, Bulat, Tzimiropoulos: Knowledge Distillation via Softmax Regression Representation Learning,"
        " ICLR 2021"
    )
    tasks: ClassVar[frozenset[str]] = frozenset(
        {"text-classification", "image-classification", "audio-classification", "tabular-classification"}
    )
    mixes: ClassVar[bool] = True
    golden: ClassVar[str] = "no reference values exist: checked against its formula in tests/methods/test_srrl.py"

    def __init__(self, config: Config, student: Loaded, teachers: Sequence[Loaded], task: Task) -> None:
        super().__init__(config, student, teachers, task)
        self.student_taps, self.teacher_taps = (config.student_tap,), (POOLED,)

    def build(self, student: _terms.Side, teacher: _terms.Side | None, data: Examples) -> None:
        """Make the connector."""
        assert teacher is not None
        value = student.taps[self.config.student_tap]
        before, after = _maps.channels_of(value), _maps.channels_of(teacher.taps[POOLED])
        if value.ndim == 4:
            layers = nn.Conv2d(before, after, 1, bias=False), PatientBatchNorm(after), nn.ReLU()
            self.connect: nn.Module = nn.Sequential(*layers)
        else:
            self.connect = nn.Linear(before, after)
            if before == after:
                nn.init.eye_(self.connect.weight)
                nn.init.zeros_(self.connect.bias)

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The distances of features and of logits."""
        assert teacher is not None
        value = student.taps[self.config.student_tap]
        if value.ndim == 4:
            f_s = self.connect(value).mean((2, 3))
        else:
            f_s = self.connect(_maps.vector_of(student, self.config.student_tap, batch))
        f_t = _maps.vector_of(teacher, POOLED, batch, teacher=True)
        _, head = head_of(teacher.model, teacher.logits.shape[-1])
        z_st = functional.linear(f_s, head.weight, head.bias)
        return [
            _terms.Term("feature", self.config.feature_weight, row_error(f_s, f_t)),
            _terms.Term("regression", self.config.feature_weight * self.config.beta, row_error(z_st, teacher.logits)),
        ]
