"""Sequence-level distillation: learn the texts that the teacher writes (SeqKD).

The teacher goes on from each prompt once; the student learns its tokens by cross-entropy.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from kdtool.generation import Warp
from kdtool.methods import _base, _sequences
from kdtool.tasks._base import Batch


@dataclass(frozen=True, slots=True)
class Config(_sequences.PromptConfig, _sequences.WritingConfig):
    """Hyper-parameters."""

    teacher_temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of the teacher's samples; 0 takes the most likely token."""
    teacher_top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of the teacher's samples."""


class Method(_sequences.SequenceMethod):
    """Sequence-level knowledge distillation."""

    paper: ClassVar[str] = "Kim, Rush: Sequence-Level Knowledge Distillation, 2016, arXiv:1606.07947"
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    needs: ClassVar[str] = "texts to go on with"
    minimum: ClassVar[str] = "a sampled text is not the distribution it was sampled from"

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Cross-entropy with what the teacher wrote."""
        warp = Warp(self.config.teacher_temperature, self.config.teacher_top_p)
        return self.learn(self.taught(batch, progress, warp), weight=0.0, ce_weight=1.0)
