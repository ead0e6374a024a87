"""Weighted soft labels: softened cross-entropy, weighted by how much the student still errs (WSLD).

For p = softmax(z / T) and l = CE(z, y) (equation 8 of the paper):

    w    = 1 - exp(-l_s / (l_t + 1e-7)),  detached
    loss = ce_weight * CE + kd_weight * T^2 * w * CE(p_t, p_s)

Units that the student gets better than the teacher lose their soft label: bias is traded for variance.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kdtool.methods import _targets, _terms
from kdtool.tasks._base import Batch

_EPS = 1e-7


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    temperature: Annotated[float, Field(gt=0)] = 4.0
    """T, softens both distributions; the weights of the units are never softened."""
    kd_weight: Annotated[float, Field(ge=0)] = 2.25
    """Weight of the soft-label term."""


def wsld_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 times the weighted softened cross-entropy, summed over units.

    Args:
        student: Logits [units, classes].
        teacher: Logits [units, classes].
        labels: [units] class ids, or soft labels [units, classes].
        temperature: T > 0.

    Returns:
        A scalar in float32, or float64 for float64 logits.
    """
    student, teacher = _targets.precise(student), _targets.precise(teacher.detach())
    with torch.no_grad():
        errors = [functional.cross_entropy(logits, labels, reduction="none") for logits in (student, teacher)]
        weights = -torch.expm1(-errors[0] / (errors[1] + _EPS))
    soft = functional.cross_entropy(student / temperature, (teacher / temperature).softmax(-1), reduction="none")
    return temperature**2 * (weights * soft).sum()


class Method(_terms.TermMethod):
    """Weighted soft labels: softened cross-entropy, weighted by how much the student still errs (WSLD)."""

    paper: ClassVar[str] = (
        "Zhou et al.: Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective, 2021, "
        "arXiv:2102.00650"
    )
    tasks: ClassVar[frozenset[str]] = frozenset(
        {
            "text-classification",
            "image-classification",
            "audio-classification",
            "tabular-classification",
            "causal-lm",
            "seq2seq-lm",
            "masked-lm",
        }
    )
    mixes: ClassVar[bool] = True
    minimum: ClassVar[str] = "a cross-entropy: a student equal to its teacher is left with the teacher's entropy"

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The weighted soft-label term."""
        assert teacher is not None
        cfg: Config = self.config
        value = wsld_loss(student.logits, teacher.logits, labels, cfg.temperature)
        return [_terms.Term("wsld", cfg.kd_weight, value)]
