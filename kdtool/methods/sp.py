"""Similarity preserving: which examples of a batch excite a network alike.

With G = F F^T of the flattened activations and its rows scaled to length 1 (equations 2 to 4 of the
paper):

    N * sum over all pairs of (G_t - G_s)^2 / N^2
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kdtool.methods import _maps, _terms
from kdtool.tasks._base import Batch


def _gram(features: Tensor) -> Tensor:
    """Row-normalised products of all pairs, [N, N]."""
    return functional.normalize(features @ features.T, dim=1)


@_maps.full_precision
def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """N times the batch's mean over all pairs.

    Args:
        student: Activations [N, ...], of any shape.
        teacher: [N, ...], detached.
    """
    difference = _gram(teacher.flatten(1)) - _gram(student.flatten(1))
    return difference.square().sum() / len(student)


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    sp_weight: Annotated[float, Field(ge=0)] = 3000.0
    """Weight of the difference of similarities."""
    student_tap: str = "-1"
    """Tap of the student: `pooled`, a stage number such as -1, or a module path."""
    teacher_tap: str = "-1"
    """Tap of the teacher: `pooled`, a stage number such as -1, or a module path."""


class Method(_maps.PairMethod):
    """Similarity preserving: which examples of a batch excite a network alike."""

    paper: ClassVar[str] = "Tung, Mori: Similarity-Preserving Knowledge Distillation, 2019, arXiv:1907.09682"
    tasks: ClassVar[frozenset[str]] = frozenset(
        {"text-classification", "image-classification", "audio-classification", "tabular-classification"}
    )
    mixes: ClassVar[bool] = True
    batchwise: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = True

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The difference of similarities."""
        assert teacher is not None
        s = _maps.flat_of(student, self.points[0], batch)
        t = _maps.flat_of(teacher, self.points[1], batch, teacher=True)
        return [_terms.Term("sp", self.config.sp_weight, _terms.over_everyone(sp_loss, s, t, batch))]
