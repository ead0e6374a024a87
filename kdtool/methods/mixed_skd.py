"""Texts that the teacher repairs in a share of the steps, those of the data in the others (mixed SKD).

With probability skd_share a step is one of SKD, else of supervised distillation: the ablation that tells
what the student's own proposals add to the data's texts. Loss per token: D(p, q).
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from kdtool.methods import _base, _sequences
from kdtool.tasks._base import Batch


@dataclass(frozen=True, slots=True)
class Config(_sequences.RepairConfig, _sequences.LossConfig, _sequences.PromptConfig, _sequences.WritingConfig):
    """Hyper-parameters."""

    skd_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the steps on texts that the student proposes and the teacher repairs."""


class Method(_sequences.SequenceMethod):
    """Speculative knowledge distillation, mixed with the data's texts."""

    paper: ClassVar[str] = (
        "Xu et al.: Speculative Knowledge Distillation: Bridging the Teacher-Student Gap Through Interleaved "
        "Sampling, 2024, arXiv:2410.11325"
    )
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm", "seq2seq-lm"})
    needs: ClassVar[str] = "texts to go on with"

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Repaired texts, or those of the data."""
        repaired = self.coin(progress) < self.config.skd_share
        return self.learn(self.repaired(batch, progress) if repaired else self.given(batch))
