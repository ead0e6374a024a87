"""Distillation between any two tokenizers by spans of text, shared tokens, and sorted others.

A group is the shortest stretch of text that is whole tokens in both. Loss of a group:

    span_weight  * D(P(group), Q(group))    the probability of its whole text against that of any other
    token_weight * [ D(p, q) + uld_weight * sum over i of |p_(i) - q_(i)| ]    of its first token

D in the second line compares tokens whose bytes both vocabularies have, all others as one outcome; the distance
of sorted probabilities compares those that only one has. With one tokenizer the first D is over all tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdtool.divergences import Divergence, Matched, compare_all, divergence
from kdtool.methods import _base, _groups
from kdtool.methods._policy import log_probs
from kdtool.models import Loaded
from kdtool.tasks._base import Batch, Task
from kdtool.tasks._spans import matched

_CERTAIN = -1e-6
"""Largest log-probability of a span, so that something is left for any other."""


@dataclass(frozen=True, slots=True)
class Config:
    """Hyper-parameters."""

    divergence: Literal["forward-kl", "reverse-kl", "jsd", "tvd", "skewed-kl", "skewed-reverse-kl"] = "jsd"
    """Forward-kl, reverse-kl, jsd, tvd, skewed-kl or skewed-reverse-kl."""
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Of jsd: 0 is forward KL, 1 reverse KL."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides both logits where tokens are compared."""
    span_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the divergence of whole spans."""
    token_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of what is compared at the first token of a span."""
    uld_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight in there of the distance of tokens that one vocabulary lacks."""
    ce_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the cross-entropy with the data's tokens."""


def span_log_probs(log_probs: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """Sums [groups] of log-probabilities [units] from `begin` to before `end`."""
    sizes = end - begin
    owners = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    units = begin.repeat_interleave(sizes) + torch.arange(len(owners), device=sizes.device) - first
    return log_probs.new_zeros(len(sizes)).index_add(0, owners, log_probs[units])


def either(log_prob: Tensor) -> Tensor:
    """Log-probabilities [groups, 2] of a span and of anything else."""
    log_prob = log_prob.clamp_max(_CERTAIN)
    return torch.stack([log_prob, torch.log(-torch.expm1(log_prob))], -1)


class Method(_groups.GroupMethod):
    """Distillation by spans of text."""

    paper: ClassVar[str] = (
        "Patino et al.: Unlocking On-Policy Distillation for Any Model Family, 2025, Hugging Face; spans and "
        "vocabularies in the manner of TRL's GOLD"
    )
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    other_tokenizers: ClassVar[bool] = True
    golden: ClassVar[str] = "no reference values: checked against its formulas in tests/methods/test_uld.py"

    def __init__(self, config: Config, student: Loaded, teachers: Sequence[Loaded], task: Task) -> None:
        super().__init__(config, student, teachers, task)
        # without a teacher in memory it is refused later, as every method that needs all logits
        pairs = matched(student.processor, (teachers or [student])[0].processor)
        self.ids: list[Any] = [torch.from_numpy(ids) for ids in pairs]
        """Tokens that both have, by the student's and the teacher's ids."""

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Compare spans, then first tokens."""
        cfg: Config = self.config
        seen = self.see(batch)
        own, theirs, (b, e, b_t, e_t) = seen.own, seen.theirs, seen.places.unbind(1)
        log_q = log_probs(own.hidden, own.head, own.labels)
        with torch.no_grad():
            log_p = log_probs(theirs.hidden, theirs.head, theirs.labels)
        ce = -log_q.sum()
        spans = divergence(
            either(span_log_probs(log_q, b, e)),
            either(span_log_probs(log_p, b_t, e_t)),
            Divergence(cfg.divergence, cfg.beta),
        )
        which = Divergence(cfg.divergence, cfg.beta, temperature=cfg.temperature)
        student_ids, teacher_ids = (ids.to(b.device) for ids in self.ids)
        measure = Matched(student_ids, teacher_ids, which, cfg.uld_weight)
        terms = [(measure, cfg.token_weight)]
        tokens, sums = compare_all(own.hidden[b], own.head, (theirs.hidden[b_t], theirs.head), None, terms)
        total = cfg.ce_weight * ce + cfg.span_weight * spans + tokens
        return _base.Losses(total, len(own.hidden), {"ce": ce.detach(), "spans": spans.detach(), "tokens": sums[1]})
