"""Token-level distillation on the data's own texts: any divergence from the teacher at every token.

Loss per token: D(p, q). What [kd](kd.md) does with a softened forward KL and labels, with a choice of divergences
and without holding the logits of a whole batch.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from kdtool.methods import _base, _sequences
from kdtool.tasks._base import Batch


@dataclass(frozen=True, slots=True)
class Config(_sequences.LossConfig, _sequences.PromptConfig):
    """Hyper-parameters."""

    ce_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the cross-entropy with the data's tokens."""


class Method(_sequences.SequenceMethod):
    """Supervised distillation of language models."""

    paper: ClassVar[str] = (
        "Sanh et al.: DistilBERT, a distilled version of BERT, 2019, arXiv:1910.01108; the baseline of GKD and SKD"
    )
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm", "seq2seq-lm"})
    needs: ClassVar[str] = "next tokens to predict"
    packs: ClassVar[bool] = True

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Compare on the data."""
        text = self.given(batch)
        return self.learn(text, ce_weight=self.config.ce_weight, told=self.stored(batch, text))

    def told_at(self) -> float:
        """The temperature of the divergence."""
        return float(self.config.temperature)
