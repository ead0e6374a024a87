"""Distillation after standardising the logits of each example.

Each row of logits is shifted to mean 0 and scaled to standard deviation 1 on both sides before
the softened divergence: the student need not match the teacher's range, only its shape.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from kdtool.divergences import cross_entropy, forward_kl, standardize
from kdtool.methods import _base
from kdtool.tasks._base import Batch


@dataclass(frozen=True, slots=True)
class Config:
    """Hyper-parameters."""

    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Base temperature T; standardised logits are divided by it."""
    ce_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross-entropy with the labels."""
    kd_weight: Annotated[float, Field(ge=0)] = 9.0
    """Weight of the divergence from the teacher."""


class Method(_base.Method):
    """Distillation after standardising the logits of each example."""

    paper: ClassVar[str] = (
        "Sun, Ren, Li, Wang, Cao: Logit Standardization in Knowledge Distillation, 2024, arXiv:2403.01427"
    )
    tasks: ClassVar[frozenset[str]] = frozenset(
        {"text-classification", "image-classification", "audio-classification", "causal-lm"}
    )
    golden: ClassVar[str] = "no reference values were recorded: checked against its formula in tests/test_divergences.py"

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Weighted sum of label and teacher terms."""
        cfg: Config = self.config
        out, target = self.task.forward(self.student, batch), self.teach(batch)
        kd = forward_kl(standardize(out.logits), standardize(target.logits), cfg.temperature)
        ce = cross_entropy(out.logits, _base.labels_of(out)) if cfg.ce_weight else kd.new_zeros(())
        total = cfg.ce_weight * ce + cfg.kd_weight * kd
        return _base.Losses(total, out.logits.shape[0], {"ce": ce.detach(), "kd": kd.detach()})
