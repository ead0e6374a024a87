"""Squared difference of raw logits.

Loss per unit: ce_weight * CE(y, z_s) + mse_weight * mean over classes of (z_s - z_t)^2.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from kdtool.divergences import cross_entropy, squared_error
from kdtool.methods import _base
from kdtool.tasks._base import Batch


@dataclass(frozen=True, slots=True)
class Config:
    """Hyper-parameters."""

    ce_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross-entropy with the labels."""
    mse_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the squared logit difference."""


class Method(_base.Method):
    """Squared difference of raw logits."""

    paper: ClassVar[str] = "Ba, Caruana: Do Deep Nets Really Need to be Deep?, 2014, arXiv:1312.6184"
    tasks: ClassVar[frozenset[str]] = frozenset(
        {"text-classification", "image-classification", "audio-classification", "causal-lm"}
    )
    golden: ClassVar[str] = "no published code to record: checked against its formula in tests/test_divergences.py"

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Weighted sum of label and teacher terms."""
        cfg: Config = self.config
        out, target = self.task.forward(self.student, batch), self.teach(batch)
        mse = squared_error(out.logits, target.logits)
        ce = cross_entropy(out.logits, _base.labels_of(out)) if cfg.ce_weight else mse.new_zeros(())
        total = cfg.ce_weight * ce + cfg.mse_weight * mse
        return _base.Losses(total, out.logits.shape[0], {"ce": ce.detach(), "mse": mse.detach()})
