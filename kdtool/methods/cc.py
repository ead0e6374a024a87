"""Correlation congruence: differences of neighbouring examples must go together.

With d_i = |f_s,i - f_t,i|, elementwise, between features of the same width (a trained projection
brings the student's to the teacher's where they differ):

    N * mean over i of sum over channels of d_i * d_(i+1)

the form of the public toolboxes, which is a first-order stand-in for the kernel of the paper
(equations 5 to 7).
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from kdtool.data.examples import Examples
from kdtool.methods import _maps, _terms
from kdtool.tasks._base import Batch


@_maps.full_precision
def cc_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """N times the mean over neighbours in the batch; 0 for a batch of one.

    Args:
        student: [N, C]
        teacher: [N, C], detached.
    """
    difference = (student - teacher).abs()
    pairs = (difference[:-1] * difference[1:]).sum()
    return pairs * len(student) / max(1, len(student) - 1)


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    cc_weight: Annotated[float, Field(ge=0)] = 0.02
    """Weight of the congruence term."""
    student_tap: str = "pooled"
    """Tap of the student: `pooled`, a stage number such as -1, or a module path."""
    teacher_tap: str = "pooled"
    """Tap of the teacher: `pooled`, a stage number such as -1, or a module path."""


class Method(_maps.PairMethod):
    """Correlation congruence: differences of neighbouring examples must go together."""

    paper: ClassVar[str] = "Peng et al.: Correlation Congruence for Knowledge Distillation, 2019, arXiv:1904.01802"
    tasks: ClassVar[frozenset[str]] = frozenset(
        {"text-classification", "image-classification", "audio-classification", "tabular-classification"}
    )
    mixes: ClassVar[bool] = True
    batchwise: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = True

    def build(self, student: _terms.Side, teacher: _terms.Side | None, data: Examples) -> None:
        """Make a projection where the widths differ."""
        assert teacher is not None
        widths = self.channels(student, teacher)
        self.project: nn.Module = nn.Identity() if widths[0] == widths[1] else nn.Linear(*widths)

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The congruence of neighbours."""
        assert teacher is not None
        s, t = self.vectors(student, teacher, batch)
        value = _terms.over_everyone(cc_loss, self.project(s), t, batch)
        return [_terms.Term("cc", self.config.cc_weight, value)]
