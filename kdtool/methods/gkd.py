"""Generalised distillation: in a share of the steps learn on the student's own texts (GKD).

With probability student_share a step uses texts sampled from the student, else those of the data. Loss per
token: the generalised Jensen-Shannon divergence beta KL(p||m) + (1 - beta) KL(q||m), m = beta p + (1 - beta) q.
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

    student_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the steps on the student's texts: 0 is supervised, 1 on-policy distillation."""
    divergence: Literal["forward-kl", "reverse-kl", "jsd", "tvd", "skewed-kl", "skewed-reverse-kl"] = "jsd"
    """Forward-kl, reverse-kl, jsd, tvd, skewed-kl or skewed-reverse-kl."""
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Of jsd: 0 is forward KL, 1 reverse KL."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides both logits in the loss, without a factor T^2."""
    student_temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of the student's samples; 0 takes the most likely token."""
    student_top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of the student's samples."""


class Method(_sequences.SequenceMethod):
    """Generalised knowledge distillation."""

    paper: ClassVar[str] = (
        "Agarwal et al.: On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes, 2023, "
        "arXiv:2306.13649"
    )
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    needs: ClassVar[str] = "texts to go on with"

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Texts of the student or of the data."""
        cfg: Config = self.config
        if self.coin(progress) < cfg.student_share:
            sampling = Interleaving(student=Warp(cfg.student_temperature, cfg.student_top_p), stop=self.stop)
            text = self.write(batch, sampling, self.key(progress))
        else:
            text = self.given(batch)
        return self.learn(text, Divergence(cfg.divergence, cfg.beta, temperature=cfg.temperature), 1.0, 0.0)
