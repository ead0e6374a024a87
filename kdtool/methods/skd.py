"""Learn on texts that the student proposes token by token and the teacher repairs (SKD).

A proposed token stays if it is among the k most likely of the teacher; else a draw from the teacher
replaces it. Loss per token: D(p, q), the student's q from the teacher's p, on what was written.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kdtool.divergences import Divergence
from kdtool.generation import Interleaving, Warp
from kdtool.methods import _base, _sequences
from kdtool.tasks._base import Batch


@dataclass(frozen=True, slots=True)
class Config(_sequences.PromptConfig):
    """Hyper-parameters."""

    k: Annotated[int, Field(gt=0)] = 25
    """Rank up to which the teacher lets a token pass; the size of the vocabulary makes it on-policy."""
    gamma: Annotated[int, Field(gt=0)] = 5
    """Tokens drafted before the teacher looks; changes the speed, not the texts."""
    divergence: Literal["forward-kl", "reverse-kl", "jsd", "tvd", "skewed-kl", "skewed-reverse-kl"] = "forward-kl"
    """Forward-kl, reverse-kl, jsd, tvd, skewed-kl or skewed-reverse-kl."""
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Of jsd: 0 is forward KL, 1 reverse KL."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides both logits in the loss, without a factor T^2."""
    student_temperature: Annotated[float, Field(ge=0)] = 0.5
    """Of proposals; 0 takes the most likely token."""
    student_top_p: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Nucleus of proposals."""
    teacher_temperature: Annotated[float, Field(ge=0)] = 0.2
    """Of replacements."""
    teacher_top_p: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Nucleus of replacements."""


class Method(_sequences.SequenceMethod):
    """Speculative knowledge distillation."""

    paper: ClassVar[str] = (
        "Xu et al.: Speculative Knowledge Distillation: Bridging the Teacher-Student Gap Through Interleaved "
        "Sampling, 2024, arXiv:2410.11325"
    )
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    needs: ClassVar[str] = "texts to go on with"

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Write, then learn from what was written."""
        cfg: Config = self.config
        student, teacher = (
            Warp(cfg.student_temperature, cfg.student_top_p),
            Warp(cfg.teacher_temperature, cfg.teacher_top_p),
        )
        sampling = Interleaving(cfg.k, cfg.gamma, student, teacher, self.stop)
        text = self.write(batch, sampling, self.key(progress), "both")
        return self.learn(text, Divergence(cfg.divergence, cfg.beta, temperature=cfg.temperature), 1.0, 0.0)
