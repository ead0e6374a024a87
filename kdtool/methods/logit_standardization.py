"""Distillation after standardising the logits of each example.

Each row of logits is shifted to mean 0 and scaled to standard deviation 1 on both sides before
the softened divergence: the student need not match the teacher's range, only its shape.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from kdtool.divergences import forward_kl, standardize
from kdtool.methods import _terms
from kdtool.tasks._base import Batch


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Base temperature T; standardised logits are divided by it."""
    kd_weight: Annotated[float, Field(ge=0)] = 9.0
    """Weight of the divergence from the teacher."""


class Method(_terms.TermMethod):
    """Distillation after standardising the logits of each example."""

    paper: ClassVar[str] = (
        "Sun, Ren, Li, Wang, Cao: Logit Standardization in Knowledge Distillation, 2024, arXiv:2403.01427"
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
    golden: ClassVar[str] = "no reference values exist: checked against its formula in tests/test_divergences.py"

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The divergence of standardised logits."""
        assert teacher is not None
        cfg: Config = self.config
        kd = forward_kl(standardize(student.logits), standardize(teacher.logits), cfg.temperature)
        return [_terms.Term("kd", cfg.kd_weight, kd)]
