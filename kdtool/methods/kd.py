"""Knowledge distillation with softened targets (Hinton).

Loss per unit: ce_weight * CE(y, z_s) + kd_weight * T^2 * KL(p_t || p_s), with p = softmax(z / T).
Public toolboxes use T = 4 with 0.1 and 0.9.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from kdtool.divergences import Divergence, forward_kl
from kdtool.methods import _terms
from kdtool.tasks._base import Batch


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    temperature: Annotated[float, Field(gt=0)] = 4.0
    """T, softens both distributions."""
    ce_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the cross-entropy with the labels."""
    kd_weight: Annotated[float, Field(ge=0)] = 0.9
    """Weight of the divergence from the teacher."""


class Method(_terms.TermMethod):
    """Knowledge distillation with softened targets (Hinton)."""

    paper: ClassVar[str] = "Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531"
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

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The divergence from the teacher."""
        assert teacher is not None
        cfg: Config = self.config
        return [_terms.Term("kd", cfg.kd_weight, forward_kl(student.logits, teacher.logits, cfg.temperature))]

    def measures(self, progress: float) -> list[_terms.Measured]:
        """The same of language models."""
        cfg: Config = self.config
        which = Divergence("forward-kl", temperature=cfg.temperature)
        return [_terms.Measured("kd", cfg.kd_weight, which, cfg.temperature**2)]
