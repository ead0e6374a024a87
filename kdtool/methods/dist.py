"""Correlation instead of divergence: rows and columns of the probabilities need only correlate (DIST).

For p = softmax(z / T) [units, classes] and Pearson's correlation rho (equations 8 to 10 of the paper):

    inter = 1 - mean over units of rho(p_s[i, :], p_t[i, :])
    intra = 1 - mean over classes of rho(p_s[:, c], p_t[:, c])
    loss  = ce_weight * CE + beta * inter + gamma * intra

The second term couples the units of a batch. Neither term carries T^2: correlation has no scale.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from kdtool.methods import _targets, _terms
from kdtool.tasks._base import Batch

_EPS = 1e-8


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """T, softens both distributions."""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the correlation over classes, within each unit."""
    gamma: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the correlation over units, within each class."""


def _uncorrelated(left: Tensor, right: Tensor) -> Tensor:
    """1 - mean Pearson correlation of the rows of two matrices."""
    left, right = (x - x.mean(-1, keepdim=True) for x in (left, right))
    # the square root of a constant row's 0 would have no gradient: norms have one there, 0
    norms = left.norm(dim=-1) * right.norm(dim=-1)
    correlation: Tensor = ((left * right).sum(-1) / (norms + _EPS)).mean()
    return 1 - correlation


def dist_terms(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Relation between and within classes: each is the number of units times the batch's loss.

    Args:
        student: Logits [units, classes].
        teacher: Logits [units, classes].
        temperature: T > 0.

    Returns:
        Two scalars, units * inter and units * intra, in float32, or float64 for float64 logits.
    """
    p, q = (_targets.precise(z).div(temperature).softmax(-1) for z in (student, teacher.detach()))
    return len(p) * _uncorrelated(p, q), len(p) * _uncorrelated(p.T, q.T)


class Method(_terms.TermMethod):
    """Correlation instead of divergence: rows and columns of the probabilities need only correlate (DIST)."""

    paper: ClassVar[str] = "Huang et al.: Knowledge Distillation from A Stronger Teacher, 2022, arXiv:2205.10536"
    tasks: ClassVar[frozenset[str]] = frozenset(
        {"text-classification", "image-classification", "audio-classification", "tabular-classification"}
    )
    mixes: ClassVar[bool] = True
    batchwise: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = True
    minimum: ClassVar[str] = "0 only up to the 1e-8 in the denominator, which counts where outputs hardly differ"

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The relation between classes and that within them."""
        assert teacher is not None
        cfg: Config = self.config

        def within(own: Tensor, other: Tensor) -> Tensor:
            return dist_terms(own, other, cfg.temperature)[1]

        inter, _ = dist_terms(student.logits, teacher.logits, cfg.temperature)
        intra = _terms.over_everyone(within, student.logits, teacher.logits, batch)
        return [_terms.Term("inter", cfg.beta, inter), _terms.Term("intra", cfg.gamma, intra)]
