"""Probabilistic knowledge transfer: how alike the examples of a batch are, as distributions.

With s and t the rows of (cos + 1) / 2 over all pairs of features, divided by their sums (equations 3
to 6 of the paper, cosine kernel):

    N * mean over all pairs (i, j) of t_ij * log((t_ij + e) / (s_ij + e)),   e = 1e-7
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from kdtool.methods import _maps, _terms
from kdtool.tasks._base import Batch


def _affinity(features: Tensor, eps: float) -> Tensor:
    """Rows of the pairwise distribution [N, N]."""
    unit: Tensor = features / (features.norm(dim=1, keepdim=True) + eps)
    alike = (unit @ unit.T + 1) / 2
    return alike / alike.sum(1, keepdim=True)


@_maps.full_precision
def pkt_loss(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """N times the batch's mean; the widths may differ.

    Args:
        student: [N, C_s]
        teacher: [N, C_t], detached.
        eps: Keeps the logarithm finite.
    """
    s, t = _affinity(student, eps), _affinity(teacher, eps)
    return (t * ((t + eps) / (s + eps)).log()).mean() * len(student)


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    pkt_weight: Annotated[float, Field(ge=0)] = 30000.0
    """Weight of the divergence; the mean over all N^2 pairs makes its values tiny."""
    student_tap: str = "pooled"
    """Tap of the student: `pooled`, a stage number such as -1, or a module path."""
    teacher_tap: str = "pooled"
    """Tap of the teacher: `pooled`, a stage number such as -1, or a module path."""


class Method(_maps.PairMethod):
    """Probabilistic knowledge transfer: how alike the examples of a batch are."""

    paper: ClassVar[str] = (
        "Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer, 2018, arXiv:1803.10837"
    )
    tasks: ClassVar[frozenset[str]] = frozenset(
        {"text-classification", "image-classification", "audio-classification", "tabular-classification"}
    )
    mixes: ClassVar[bool] = True
    batchwise: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = True

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The divergence of the pairwise distributions."""
        assert teacher is not None
        s, t = self.vectors(student, teacher, batch)
        return [_terms.Term("pkt", self.config.pkt_weight, _terms.over_everyone(pkt_loss, s, t, batch))]
