"""Imitate the teacher on a mixture of the data's texts and the student's own (ImitKD).

With probability student_share a step uses texts sampled from the student, else those of the data. Loss per
token: KL(p||q). With schedule=decay the data's share falls exponentially from 1 to 1 - student_share.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kdtool.methods import _base, _sequences
from kdtool.tasks._base import Batch


@dataclass(frozen=True, slots=True)
class Config(_sequences.SamplingConfig, _sequences.LossConfig, _sequences.PromptConfig, _sequences.WritingConfig):
    """Hyper-parameters."""

    student_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the steps on the student's texts; with schedule=decay that at the end of training."""
    schedule: Literal["constant", "decay"] = "constant"
    """Constant, or decay: the share of the data's texts falls as (1 - student_share)^(share of training done)."""


class Method(_sequences.SequenceMethod):
    """Autoregressive distillation through imitation learning."""

    paper: ClassVar[str] = (
        "Lin et al.: Autoregressive Knowledge Distillation through Imitation Learning, 2020, arXiv:2009.07253"
    )
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm", "seq2seq-lm"})
    needs: ClassVar[str] = "texts to go on with"

    def student_share(self, progress: float) -> float:
        """Probability that a step uses the student's texts."""
        share = float(self.config.student_share)
        return share if self.config.schedule == "constant" else 1 - (1 - share) ** progress

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Texts of the student or of the data."""
        own = self.coin(progress) < self.student_share(progress)
        return self.learn(self.sampled(batch, progress) if own else self.given(batch))
