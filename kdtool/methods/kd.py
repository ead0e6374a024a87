"""Knowledge distillation with softened targets (Hinton).

Loss per unit: ce_weight * CE(y, z_s) + kd_weight * T^2 * KL(p_t || p_s), with p = softmax(z / T).
Public toolboxes use T = 4 with 0.1 and 0.9.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from kdtool.divergences import cross_entropy, forward_kl
from kdtool.methods import _base
from kdtool.tasks._base import Batch


@dataclass(frozen=True, slots=True)
class Config:
    """Hyper-parameters."""

    temperature: Annotated[float, Field(gt=0)] = 4.0
    """T, softens both distributions."""
    ce_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the cross-entropy with the labels."""
    kd_weight: Annotated[float, Field(ge=0)] = 0.9
    """Weight of the divergence from the teacher."""


class Method(_base.Method):
    """Knowledge distillation with softened targets (Hinton)."""

    paper: ClassVar[str] = "Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531"
    tasks: ClassVar[frozenset[str]] = frozenset(
        {"text-classification", "image-classification", "audio-classification", "causal-lm"}
    )

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Weighted sum of label and teacher terms."""
        cfg: Config = self.config
        out, target = self.task.forward(self.student, batch), self.teach(batch)
        kd = forward_kl(out.logits, target.logits, cfg.temperature)
        ce = cross_entropy(out.logits, _base.labels_of(out)) if cfg.ce_weight else kd.new_zeros(())
        total = cfg.ce_weight * ce + cfg.kd_weight * kd
        return _base.Losses(total, out.logits.shape[0], {"ce": ce.detach(), "kd": kd.detach()})
