"""Squared difference of raw logits.

Loss per unit: ce_weight * CE(y, z_s) + mse_weight * mean over classes of (z_s - z_t)^2.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from kdtool.divergences import squared_error
from kdtool.methods import _terms
from kdtool.tasks._base import Batch


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    mse_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the squared logit difference."""


class Method(_terms.TermMethod):
    """Squared difference of raw logits."""

    paper: ClassVar[str] = "Ba, Caruana: Do Deep Nets Really Need to be Deep?, 2014, arXiv:1312.6184"
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
    golden: ClassVar[str] = "no published code to record: checked against its formula in tests/test_divergences.py"

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The squared logit difference."""
        assert teacher is not None
        return [_terms.Term("mse", self.config.mse_weight, squared_error(student.logits, teacher.logits))]
