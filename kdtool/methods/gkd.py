"""Generalised distillation: in a share of the steps learn on the student's own texts (GKD).

With probability student_share a step uses texts sampled from the student, else those of the data, or the
teacher's. Loss per token: the generalised Jensen-Shannon divergence beta KL(p||m) + (1 - beta) KL(q||m),
m = beta p + (1 - beta) q.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kdtool.generation import Warp
from kdtool.methods import _base, _sequences
from kdtool.tasks._base import Batch


@dataclass(frozen=True, slots=True)
class Config(_sequences.SamplingConfig, _sequences.LossConfig, _sequences.PromptConfig, _sequences.WritingConfig):
    """Hyper-parameters."""

    student_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the steps on the student's texts: 0 is supervised, 1 on-policy distillation."""
    divergence: Literal["forward-kl", "reverse-kl", "jsd", "tvd", "skewed-kl", "skewed-reverse-kl"] = "jsd"
    """Forward-kl, reverse-kl, jsd, tvd, skewed-kl or skewed-reverse-kl."""
    seqkd: bool = False
    """Let the teacher write the texts of the other steps, instead of taking the data's."""


class Method(_sequences.SequenceMethod):
    """Generalised knowledge distillation."""

    paper: ClassVar[str] = (
        "Agarwal et al.: On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes, 2023, "
        "arXiv:2306.13649"
    )
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm", "seq2seq-lm"})
    needs: ClassVar[str] = "texts to go on with"

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Texts of the student, or of the data or the teacher."""
        if self.coin(progress) < self.config.student_share:
            return self.learn(self.sampled(batch, progress))
        return self.learn(self.taught(batch, progress, Warp()) if self.config.seqkd else self.given(batch))
