"""Cross-entropy with labels smoothed towards uniform: the teacher-free control.

Targets are (1 - epsilon) * onehot + epsilon / C.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from kdtool.divergences import cross_entropy
from kdtool.methods import _base
from kdtool.tasks._base import Batch


@dataclass(frozen=True, slots=True)
class Config:
    """Hyper-parameters."""

    epsilon: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the target mass spread evenly over all classes."""


class Method(_base.Method):
    """Cross-entropy with labels smoothed towards uniform: the teacher-free control."""

    paper: ClassVar[str] = (
        "Szegedy et al.: Rethinking the Inception Architecture for Computer Vision, 2016, section 7, arXiv:1512.00567"
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
    teachers: ClassVar[tuple[int, int]] = (0, 1)
    reads_teacher: ClassVar[bool] = False
    golden: ClassVar[str] = "smoothed cross-entropy: checked against its formula in tests/test_divergences.py"

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Cross-entropy with smoothed labels."""
        out = self.task.forward(self.student, batch)
        loss = cross_entropy(out.logits, _base.labels_of(out), self.config.epsilon)
        return _base.Losses(loss, out.logits.shape[0], {"ce": loss.detach()})
