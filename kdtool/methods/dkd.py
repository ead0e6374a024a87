"""Decoupled distillation: the label's share and the other classes as two weighted divergences (DKD).

For p = softmax(z / T), b = (p[y], 1 - p[y]) and n = softmax over the classes other than y
(equation 7 of the paper):

    loss = ce_weight * CE + alpha * T^2 * KL(b_t || b_s) + beta * T^2 * KL(n_t || n_s)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kdtool.methods import _targets, _terms
from kdtool.tasks._base import Batch


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    temperature: Annotated[float, Field(gt=0)] = 4.0
    """T, softens all distributions."""
    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the divergence between the shares of the label."""
    beta: Annotated[float, Field(ge=0)] = 8.0
    """Weight of the divergence between the distributions of the other classes."""
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.08
    """Share of training over which the terms rise linearly to their weights; the paper's 20 of 240 epochs."""


def dkd_terms(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0) -> tuple[Tensor, Tensor]:
    """Divergence of the label's share, and of the other classes, each with T^2, summed over units.

    Args:
        student: Logits [units, classes], at least 2 classes.
        teacher: Logits [units, classes].
        labels: [units] class ids, or soft labels [units, classes], of which the largest is the target.
        temperature: T > 0.

    Returns:
        Two scalars in float32, or float64 for float64 logits.
    """
    student = _targets.precise(student) / temperature
    teacher = _targets.precise(teacher.detach()) / temperature
    mask = _targets.mask_of(student, _targets.hard(labels))

    def shares(logits: Tensor) -> Tensor:
        """log(p[y], 1 - p[y]): [units, 2]; never the logarithm of a probability that became 0."""
        log_p = functional.log_softmax(logits, -1)
        rest = log_p.masked_fill(mask, -torch.inf).logsumexp(-1)
        return torch.stack([log_p.masked_fill(~mask, 0.0).sum(-1), rest], -1)

    target = functional.kl_div(shares(student), shares(teacher), reduction="sum", log_target=True)
    difference = _targets.log_softmax_without(teacher, mask) - _targets.log_softmax_without(student, mask)
    nontarget = (_targets.softmax_without(teacher, mask) * difference).sum()
    return temperature**2 * target, temperature**2 * nontarget


class Method(_terms.TermMethod):
    """Decoupled distillation: the label's share and the other classes as two weighted divergences (DKD)."""

    paper: ClassVar[str] = "Zhao et al.: Decoupled Knowledge Distillation, 2022, arXiv:2203.08679"
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

    def cautions(self, epochs: float) -> Sequence[str]:
        """Large weights lose to plain training in short schedules."""
        cfg: Config = self.config
        return _targets.caution("dkd", "beta * temperature^2", cfg.beta * cfg.temperature**2, epochs)

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The divergence of the label's share and that of the other classes."""
        assert teacher is not None
        cfg: Config = self.config
        target, nontarget = dkd_terms(student.logits, teacher.logits, labels, cfg.temperature)
        return [_terms.Term("target", cfg.alpha, target), _terms.Term("nontarget", cfg.beta, nontarget)]
