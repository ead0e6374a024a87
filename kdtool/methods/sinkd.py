"""Sinkhorn distance between all outputs of a batch, beside softened cross-entropy (SinKD).

For p = softmax(z_s / tau), q = softmax(z_t / tau) over a batch of b units (equations 4 to 8 of the
paper, in the form of its code):

    D[i,j] = sum over classes of |p_i - q_j|
    P      = exp(-D / eps), after `rounds` times: rows divided by their sums, then columns
    loss   = ce_weight * CE + kd_weight * KD + beta * scale * sum(P * D)
    KD     = - sum over classes of softmax(z_t / T) * log softmax(z_s / T)

The distance sees two sets, not pairs: it ignores which output belongs to which unit, so it never
stands alone. It couples the units of a batch; with several processes it is taken over the units of
all of them, for language models over blocks of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kdtool.divergences import Divergence, Sinkhorn, precise
from kdtool.methods import _terms
from kdtool.models import Loaded
from kdtool.tasks._base import Batch, Task
from kdtool.train.parallel import gather_units


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    tau: Annotated[float, Field(gt=0)] = 2.0
    """Temperature of the distributions that are transported."""
    eps: Annotated[float, Field(gt=0)] = 0.1
    """Entropic regularisation; smaller brings the plan nearer to a matching."""
    rounds: Annotated[int, Field(ge=1)] = 20
    """Sinkhorn rounds, all of which are differentiated."""
    beta: Annotated[float, Field(ge=0)] = 0.8
    """Weight of the Sinkhorn term."""
    scale: Annotated[float, Field(ge=0)] = 0.001
    """Second factor of the Sinkhorn term, as published for a sum over the batch."""
    mean: bool = False
    """Divide the distance by the batch size; a scale of 0.016 then equals the published one at batch size 16."""
    debiased: bool = False
    """Subtract half of the distance of each set to itself, so that equal sets have distance 0."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """T of the softened cross-entropy, which carries no factor T^2."""
    anneal: bool = False
    """Let T move linearly to 1 in the course of training."""
    ce_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the cross-entropy with the labels; 1 - alpha of the paper."""
    kd_weight: Annotated[float, Field(ge=0)] = 0.9
    """Weight of the softened cross-entropy with the teacher; alpha of the paper."""
    block: Annotated[int, Field(ge=1)] = 256
    """Language models: most tokens of one transport problem; classifiers take the whole batch."""
    top_k: Annotated[int, Field(ge=1)] = 64
    """With more than 4096 classes, those among the teacher's k likeliest of any unit count, the rest as one."""


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """KD: cross-entropy with the softened teacher, summed over units, without T^2.

    Args:
        student: Logits [units, classes]; with one class (regression) the squared difference is taken.
        teacher: Logits [units, classes].
        temperature: T > 0.
    """
    z_s, z_t = (precise(logits) / temperature for logits in (student, teacher.detach()))
    if z_s.shape[-1] == 1:
        return (z_s - z_t).square().sum()
    return functional.cross_entropy(z_s, z_t.softmax(-1), reduction="sum")


def annealed(temperature: float, progress: float) -> float:
    """T on its way to 1, at a share of training."""
    return temperature + (1 - temperature) * progress


class Method(_terms.TermMethod):
    """Sinkhorn distance between all outputs of a batch, beside softened cross-entropy (SinKD)."""

    paper: ClassVar[str] = (
        "Cui et al.: Sinkhorn Distance Minimization for Knowledge Distillation, 2024, arXiv:2402.17110"
    )
    tasks: ClassVar[frozenset[str]] = frozenset(
        {
            "text-classification",
            "image-classification",
            "audio-classification",
            "tabular-classification",
            "causal-lm",
            "seq2seq-lm",
            "masked-lm",
        }
    )
    mixes: ClassVar[bool] = True
    batchwise: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = True
    minimum: ClassVar[str] = "a cross-entropy, and entropic transport, which moves mass even between equal sets"

    def __init__(self, config: Config, student: Loaded, teachers: Sequence[Loaded], task: Task) -> None:
        super().__init__(config, student, teachers, task)
        self.shared = task.classifies
        """True if the units of all processes are one problem; blocks of tokens stay where they are."""

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The softened cross-entropy and the Sinkhorn distance."""
        assert teacher is not None
        cfg: Config = self.config
        degree = annealed(cfg.temperature, progress) if cfg.anneal else cfg.temperature
        found = [_terms.Term("kd", cfg.kd_weight, soft_cross_entropy(student.logits, teacher.logits, degree))]
        if student.logits.shape[-1] > 1:
            value = self.sinkhorn(student.logits, teacher.logits, batch)
            found.append(_terms.Term("sinkhorn", cfg.beta * cfg.scale, value))
        return found

    def measures(self, progress: float) -> list[_terms.Measured]:
        """The same of language models; see `terms`."""
        cfg: Config = self.config
        degree = annealed(cfg.temperature, progress) if cfg.anneal else cfg.temperature
        return [
            _terms.Measured("kd", cfg.kd_weight, Divergence("cross-entropy", temperature=degree)),
            _terms.Measured("sinkhorn", cfg.beta * cfg.scale, self.distance()),
        ]

    @classmethod
    def chunk(cls, config: Any) -> int | None:
        """A block."""
        return int(config.block)

    def distance(self) -> Sinkhorn:
        """The Sinkhorn term of a batch, or of blocks of tokens."""
        cfg: Config = self.config
        block = None if self.shared else cfg.block
        return Sinkhorn(cfg.tau, cfg.eps, cfg.rounds, cfg.debiased, cfg.mean, cfg.top_k, block=block)

    def sinkhorn(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Number of units times the distance; with several processes, this one's share of the value."""
        distance = self.distance()
        if not self.shared:
            return distance.of(student, teacher)
        everyone, begin = gather_units(student)
        if everyone is student:
            return distance.of(student, teacher)
        teacher, _ = gather_units(teacher)
        rows, _ = gather_units(_terms.rows_of(batch).to(student.device))
        # a process left without rows runs one of another's, which must not count twice
        fresh = ~(rows[:, None] == rows).tril(-1).any(1)
        mine = torch.zeros_like(fresh)
        mine[begin : begin + len(student)] = True
        values, counted = distance.units(everyone[fresh], teacher[fresh]), mine[fresh]
        # the whole gradient, but only the value of the rows of this process
        others = values.masked_fill(counted, 0.0).sum()
        value = values.masked_fill(~counted, 0.0).sum() + others - others.detach()
        return distance.factor(len(values)) * value
