"""Relational knowledge distillation: distances and angles between the examples of a batch.

    N * [distance_weight * smoothL1(d_s, d_t) + angle_weight * smoothL1(a_s, a_t)]

d are pairwise Euclidean distances divided by the mean of the positive ones (equation 6 of the
paper), a the cosines of the angles of all triplets (equation 9); smoothL1 is the mean Huber loss.
Cosines take N^3 values: they are made for a few vertices at a time, and again in the backward pass
where they would not fit.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kdtool.methods import _maps, _terms
from kdtool.tasks._base import Batch

_LIMIT = 2**24
"""Values of one chunk of triplets at most: 64 MiB."""


def _distances(features: Tensor) -> Tensor:
    """Pairwise distances [N, N] relative to the mean of the positive ones."""
    squares = features.square().sum(1)
    between = (squares[:, None] + squares[None, :] - 2 * features @ features.T).clamp_min(1e-12).sqrt()
    between = between.clone().fill_diagonal_(0)
    positive = between > 0
    return between / (between.sum() / positive.sum().clamp_min(1)).clamp_min(1e-12)


@_maps.full_precision
def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """N times the mean Huber loss of relative distances between rows of [N, C_s] and [N, C_t]."""
    return functional.smooth_l1_loss(_distances(student), _distances(teacher)) * len(student)


def _cosines(features: Tensor, vertices: Tensor) -> Tensor:
    """Cosines [V, N, N] of the angles at some vertices [V, C] between all pairs of rows."""
    edges = functional.normalize(features[None] - vertices[:, None], dim=2)
    return edges @ edges.transpose(1, 2)


def _angle_sum(student: Tensor, teacher: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return functional.smooth_l1_loss(_cosines(student, s), _cosines(teacher, t), reduction="sum")


@_maps.full_precision
def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """N times the mean Huber loss of the cosines of all triplets of rows of [N, C_s] and [N, C_t]."""
    size = len(student)
    wide = max(size, student.shape[1], teacher.shape[1])
    chunks = -(-(size * size * wide) // _LIMIT)
    if chunks == 1:
        return _angle_sum(student, teacher, student, teacher) / size**2
    total: Any = 0.0
    for s, t in zip(student.chunk(chunks), teacher.chunk(chunks), strict=True):
        total = total + checkpoint(_angle_sum, student, teacher, s, t, use_reentrant=False)
    result: Tensor = total / size**2
    return result


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    distance_weight: Annotated[float, Field(ge=0)] = 25.0
    """Weight of the distances."""
    angle_weight: Annotated[float, Field(ge=0)] = 50.0
    """Weight of the angles."""
    student_tap: str = "pooled"
    """Tap of the student: `pooled`, a stage number such as -1, or a module path."""
    teacher_tap: str = "pooled"
    """Tap of the teacher: `pooled`, a stage number such as -1, or a module path."""


class Method(_maps.PairMethod):
    """Relational knowledge distillation: distances and angles between the examples of a batch."""

    paper: ClassVar[str] = "Park, Kim, Lu, Cho: Relational Knowledge Distillation, 2019, arXiv:1904.05068"
    tasks: ClassVar[frozenset[str]] = frozenset(
        {"text-classification", "image-classification", "audio-classification", "tabular-classification"}
    )
    mixes: ClassVar[bool] = True
    batchwise: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = True

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """Distances and angles."""
        assert teacher is not None
        s, t = self.vectors(student, teacher, batch)
        distance = _terms.over_everyone(distance_loss, s, t, batch)
        found = [_terms.Term("distance", self.config.distance_weight, distance)]
        if self.config.angle_weight:
            angle = _terms.over_everyone(angle_loss, s, t, batch)
            found.append(_terms.Term("angle", self.config.angle_weight, angle))
        return found
