"""Distillation between any two tokenizers by the distance of sorted probabilities (ULD).

Loss: ce_weight * cross-entropy + uld_weight * sum over i of |p_(i) - q_(i)|, where p_(i) is the i-th largest
probability of the teacher's next token and q_(i) the student's, the smaller vocabulary filled up with zeros
(equations 5 and 6 of the paper). The paper pairs the n-th tokens of both; here both are compared wherever the
tokens before end at the same character, so that both predict from the same text.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from kdtool.divergences import Universal, compare_all
from kdtool.methods import _base, _groups
from kdtool.tasks._base import Batch


@dataclass(frozen=True, slots=True)
class Config:
    """Hyper-parameters."""

    ce_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross-entropy with the data's tokens."""
    uld_weight: Annotated[float, Field(ge=0)] = 1.5
    """Weight of the distance, lambda of the paper."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides both logits in the distance."""


class Method(_groups.GroupMethod):
    """Universal logit distillation."""

    paper: ClassVar[str] = (
        "Boizard et al.: Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs, 2024, "
        "arXiv:2402.12030"
    )
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    other_tokenizers: ClassVar[bool] = True
    golden: ClassVar[str] = "no reference values: checked against its formula in tests/methods/test_uld.py"

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Cross-entropy on all tokens, distance at the beginning of each group."""
        cfg: Config = self.config
        seen = self.see(batch)
        own, theirs = seen.own, seen.theirs
        ce, ce_sums = compare_all(own.hidden, own.head, None, own.labels, [], cfg.ce_weight)
        there = (theirs.hidden[seen.places[:, 2]], theirs.head)
        terms = [(Universal(cfg.temperature), cfg.uld_weight)]
        apart, sums = compare_all(own.hidden[seen.places[:, 0]], own.head, there, None, terms)
        return _base.Losses(ce + apart, len(own.hidden), {"ce": ce_sums[0], "uld": sums[1]})
