"""FitNet hints: a trained map of the student's features must meet the teacher's.

    sum over examples of mean over channels and positions of (R(F_s) - F_t)^2

R is a 1x1 convolution, trained with the student and thrown away (equation 3 of the paper, with a
mean in place of the sum).
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from kdtool.data.examples import Examples
from kdtool.methods import _maps, _terms
from kdtool.tasks._base import Batch


@_maps.full_precision
def hint_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of each example, summed over examples.

    Args:
        student: Regressed features [N, C] or [N, C, P].
        teacher: The same shape, detached.
        mask: [N, P] real positions, or None where all are.
    """
    if mask is None:
        return (student - teacher).square().flatten(1).mean(1).sum()
    return _maps.squared_distance(student, teacher, mask)


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    hint_weight: Annotated[float, Field(ge=0)] = 100.0
    """Weight of the hint."""
    student_tap: str = "-1"
    """Tap of the student: `pooled`, a stage number such as -1, or a module path."""
    teacher_tap: str = "-1"
    """Tap of the teacher: `pooled`, a stage number such as -1, or a module path."""


class Method(_maps.PairMethod):
    """FitNet hints: a trained map of the student's features must meet the teacher's."""

    paper: ClassVar[str] = "Romero et al.: FitNets: Hints for Thin Deep Nets, 2015, arXiv:1412.6550"
    tasks: ClassVar[frozenset[str]] = frozenset(
        {"text-classification", "image-classification", "audio-classification", "tabular-classification"}
    )
    mixes: ClassVar[bool] = True

    def build(self, student: _terms.Side, teacher: _terms.Side | None, data: Examples) -> None:
        """Make the regressor."""
        assert teacher is not None
        self.regress = _maps.projection(*self.channels(student, teacher))

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The distance to the teacher's features."""
        assert teacher is not None
        s, t, mask = _maps.positions_of(student, teacher, self.points, batch)
        return [_terms.Term("hint", self.config.hint_weight, hint_loss(self.regress(s), t, mask))]
