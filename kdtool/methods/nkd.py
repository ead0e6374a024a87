"""Normalised distillation: target class and renormalised other classes as two terms (NKD).

For logits z_s, z_t [units, classes] and the label y (equations 5 and 6 of the paper):

    target    = - q[y] * log p[y],  p = softmax(z_s), q = softmax(z_t), always at temperature 1
    nontarget = - T^2 * sum over j != y of q^[j] * log p^[j],  p^ = softmax(z_s[not y] / T), q^ alike
    loss      = ce_weight * CE + target_weight * target + gamma * nontarget

"Normalised" means that the classes other than the label are a distribution of their own, a softmax
over classes - 1 logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kdtool.methods import _targets, _terms
from kdtool.tasks._base import Batch


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """T, softens the distributions of the other classes; the target term is never softened."""
    gamma: Annotated[float, Field(ge=0)] = 1.5
    """Weight of the term of the other classes."""
    target_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the target term."""


def nkd_terms(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Target and other-classes term, each summed over units, not weighted.

    Args:
        student: Logits [units, classes], at least 2 classes.
        teacher: Logits [units, classes].
        labels: [units] class ids, or soft labels [units, classes], of which the largest is the target.
        temperature: T of the other classes; the second term carries the factor T^2.

    Returns:
        Two scalars in float32, or float64 for float64 logits.
    """
    student, teacher = _targets.precise(student), _targets.precise(teacher.detach())
    labels = _targets.hard(labels)
    q = teacher.softmax(-1).gather(1, labels[:, None])
    target = -(q * functional.log_softmax(student, -1).gather(1, labels[:, None])).sum()
    mask = _targets.mask_of(student, labels)
    others = _targets.softmax_without(teacher / temperature, mask)
    nontarget = -(others * _targets.log_softmax_without(student / temperature, mask)).sum()
    return target, temperature**2 * nontarget


class Method(_terms.TermMethod):
    """Normalised distillation: target class and renormalised other classes as two terms (NKD)."""

    paper: ClassVar[str] = (
        "Yang et al.: From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized "
        "Loss and Customized Soft Labels, 2023, arXiv:2303.13005"
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

    def cautions(self, epochs: float) -> Sequence[str]:
        """Large weights lose to plain training in short schedules."""
        cfg: Config = self.config
        return _targets.caution("nkd", "gamma * temperature^2", cfg.gamma * cfg.temperature**2, epochs)

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The target term and that of the other classes."""
        assert teacher is not None
        cfg: Config = self.config
        target, nontarget = nkd_terms(student.logits, teacher.logits, labels, cfg.temperature)
        return [_terms.Term("target", cfg.target_weight, target), _terms.Term("nontarget", cfg.gamma, nontarget)]
