"""Learn on the student's own texts in every step (on-policy distillation).

The student goes on from each prompt and the teacher judges every token of it. Loss per token: D(p, q). It is GKD
that never looks at the data's targets.
"""

from dataclasses import dataclass
from typing import ClassVar

from kdtool.methods import _base, _sequences
from kdtool.tasks._base import Batch


@dataclass(frozen=True, slots=True)
class Config(_sequences.SamplingConfig, _sequences.LossConfig, _sequences.PromptConfig, _sequences.WritingConfig):
    """Hyper-parameters."""


class Method(_sequences.SequenceMethod):
    """On-policy distillation."""

    paper: ClassVar[str] = (
        "Agarwal et al.: On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes, 2023, "
        "arXiv:2306.13649"
    )
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm", "seq2seq-lm"})
    needs: ClassVar[str] = "texts to go on with"

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Write alone, then learn from what was written."""
        return self.learn(self.sampled(batch, progress))
