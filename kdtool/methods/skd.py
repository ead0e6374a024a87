"""Learn on texts that the student proposes token by token and the teacher repairs (SKD).

A proposed token stays if it is among the k most likely of the teacher; else a draw from the teacher
replaces it. Loss per token: D(p, q), the student's q from the teacher's p, on what was written.
"""

from dataclasses import dataclass
from typing import ClassVar

from kdtool.methods import _base, _sequences
from kdtool.tasks._base import Batch


@dataclass(frozen=True, slots=True)
class Config(_sequences.RepairConfig, _sequences.LossConfig, _sequences.PromptConfig, _sequences.WritingConfig):
    """Hyper-parameters."""


class Method(_sequences.SequenceMethod):
    """Speculative knowledge distillation."""

    paper: ClassVar[str] = (
        "Xu et al.: Speculative Knowledge Distillation: Bridging the Teacher-Student Gap Through Interleaved "
        "Sampling, 2024, arXiv:2410.11325"
    )
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm", "seq2seq-lm"})
    needs: ClassVar[str] = "texts to go on with"

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Write, then learn from what was written."""
        return self.learn(self.repaired(batch, progress))
