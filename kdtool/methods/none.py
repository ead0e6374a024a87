"""Plain fine-tuning on the labels: the control every method is measured against.

The loss is the cross-entropy with the hard labels. A teacher may be named for the comparison in
the report; it is never run during training.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from kdtool.data.examples import Examples
from kdtool.divergences import compare_all, cross_entropy
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
    by_chunks: bool = False
    golden: ClassVar[str] = "plain cross-entropy: checked against torch in tests/test_divergences.py"

    @classmethod
    def chunk(cls, config: Any) -> int | None:
        """As many tokens as the device likes."""
        return 0

    def setup(self, batch: Batch, data: Examples) -> None:
        """See whether the logits of a language model can be made some tokens at a time."""
        self.by_chunks = self.task.has_states(self.student)

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Cross-entropy with the labels."""
        if self.by_chunks:
            own = self.task.states(self.student, batch)
            loss, sums = compare_all(own.hidden, own.head, None, own.labels, [], 1.0)
            return _base.Losses(loss, len(own.hidden), {"ce": sums[0]})
        out = self.task.forward(self.student, batch)
        loss = cross_entropy(out.logits, _base.labels_of(out))
        return _base.Losses(loss, out.logits.shape[0], {"ce": loss.detach()})
