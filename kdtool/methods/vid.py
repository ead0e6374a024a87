"""Variational information distillation: the student's features must tell what the teacher's are.

    sum over examples of mean over channels and positions of
        ((mu(F_s) - F_t)^2 / v + log v) / 2,    v_c = softplus(a_c) + 1e-5

a Gaussian bound of the mutual information (equations 4 to 6 of the paper): mu is three 1x1
convolutions with ReLU between, v a trained variance for each channel that starts at 5. Both are
thrown away.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from kdtool.data.examples import Examples
from kdtool.methods import _maps, _terms
from kdtool.tasks._base import Batch

_FLOOR = 1e-5
"""Least variance."""
_START = 5.0
"""First variance."""


@_maps.full_precision
def vid_loss(mean: Tensor, teacher: Tensor, scale: Tensor, mask: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of the teacher's features but for a constant, summed over examples.

    Args:
        mean: mu(F_s) [N, C, P]
        teacher: F_t [N, C, P], detached.
        scale: a [C]; the variance is softplus(a) + 1e-5.
        mask: [N, P] real positions, or None where all are.
    """
    variance = functional.softplus(scale)[:, None] + _FLOOR
    value = ((mean - teacher).square() / variance + variance.log()) / 2
    return _maps.mean_over_positions(value.mean(1), mask).sum()


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    vid_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the bound."""
    student_tap: str = "-1"
    """Tap of the student: `pooled`, a stage number such as -1, or a module path."""
    teacher_tap: str = "-1"
    """Tap of the teacher: `pooled`, a stage number such as -1, or a module path."""


class Method(_maps.PairMethod):
    """Variational information distillation: the student's features must tell the teacher's."""

    paper: ClassVar[str] = (
        "Ahn et al.: Variational Information Distillation for Knowledge Transfer, 2019, arXiv:1904.05835"
    )
    tasks: ClassVar[frozenset[str]] = frozenset(
        {"text-classification", "image-classification", "audio-classification", "tabular-classification"}
    )
    mixes: ClassVar[bool] = True
    golden: ClassVar[str] = "no reference values exist: checked against its formula in tests/methods/test_vid.py"
    minimum: ClassVar[str] = "the predictor starts at random"

    def build(self, student: _terms.Side, teacher: _terms.Side | None, data: Examples) -> None:
        """Make the predictor and the variances."""
        assert teacher is not None
        before, after = self.channels(student, teacher)
        self.predict = nn.Sequential(
            nn.Conv1d(before, after, 1), nn.ReLU(), nn.Conv1d(after, after, 1), nn.ReLU(), nn.Conv1d(after, after, 1)
        )
        self.scale = nn.Parameter(torch.full((after,), math.log(math.expm1(_START - _FLOOR))))

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The bound."""
        assert teacher is not None
        s, t, mask = _maps.positions_of(student, teacher, self.points, batch)
        return [_terms.Term("vid", self.config.vid_weight, vid_loss(self.predict(s), t, self.scale, mask))]
