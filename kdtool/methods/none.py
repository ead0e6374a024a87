"""Plain fine-tuning on the labels: the control every method is measured against.

The loss is the cross-entropy with the hard labels. A teacher may be named for the comparison in
the report; it is never run during training.
"""

from dataclasses import dataclass
from typing import ClassVar

from kdtool.divergences import cross_entropy
from kdtool.methods import _base
from kdtool.tasks._base import Batch


@dataclass(frozen=True, slots=True)
class Config:
    """Hyper-parameters."""


class Method(_base.Method):
    """Plain fine-tuning on the labels: the control every method is measured against."""

    paper: ClassVar[str] = "no teacher"
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
    golden: ClassVar[str] = "plain cross-entropy: checked against torch in tests/test_divergences.py"

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Cross-entropy with the labels."""
        out = self.task.forward(self.student, batch)
        loss = cross_entropy(out.logits, _base.labels_of(out))
        return _base.Losses(loss, out.logits.shape[0], {"ce": loss.detach()})
