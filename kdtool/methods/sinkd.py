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
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kdtool.methods import _targets, _terms, _transport
from kdtool.models import Loaded
from kdtool.tasks._base import Batch, Task
from kdtool.train.parallel import gather_units

_MANY = 4096
"""Classes above which `top_k` applies: a vocabulary, not a label set."""


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


def cost(student: Tensor, teacher: Tensor, tau: float = 2.0) -> Tensor:
    """D: L1 distances of all softened student rows to all softened teacher rows, [a, b].

    Args:
        student: Logits [a, classes].
        teacher: Logits [b, classes].
        tau: Temperature.
    """
    p, q = (_targets.precise(logits).div(tau).softmax(-1) for logits in (student, teacher))
    return _transport.l1_cost(p, q.to(p.dtype))


def sinkhorn_rows(
    student: Tensor, teacher: Tensor, tau: float = 2.0, eps: float = 0.1, rounds: int = 20, debiased: bool = False
) -> Tensor:
    """Each student row's part of sum(P * D), [a]; see `sinkhorn_distance`."""
    with torch.autocast(student.device.type, enabled=False):
        rows = _transport.transported(cost(student, teacher, tau), eps, rounds)
        if debiased:
            own = _transport.transported(cost(student, student, tau), eps, rounds)
            theirs = _transport.transported(cost(teacher, teacher, tau), eps, rounds)
            rows = rows - 0.5 * (own + theirs)
    return rows


def sinkhorn_distance(
    student: Tensor, teacher: Tensor, tau: float = 2.0, eps: float = 0.1, rounds: int = 20, debiased: bool = False
) -> Tensor:
    """sum(P * D) of one batch, without any scale; not 0 for equal sets unless debiased.

    Args:
        student: Logits [b, classes].
        teacher: Logits [b, classes]; the order of its rows does not matter.
        tau: Temperature of both.
        eps: Entropic regularisation.
        rounds: Sinkhorn rounds.
        debiased: Subtract half of each set's distance to itself.

    Returns:
        A scalar in float32, or float64 for float64 logits.
    """
    return sinkhorn_rows(student, teacher.detach(), tau, eps, rounds, debiased).sum()


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """KD: cross-entropy with the softened teacher, summed over units, without T^2.

    Args:
        student: Logits [units, classes]; with one class (regression) the squared difference is taken.
        teacher: Logits [units, classes].
        temperature: T > 0.
    """
    z_s, z_t = (_targets.precise(logits) / temperature for logits in (student, teacher.detach()))
    if z_s.shape[-1] == 1:
        return (z_s - z_t).square().sum()
    return functional.cross_entropy(z_s, z_t.softmax(-1), reduction="sum")


def annealed(temperature: float, progress: float) -> float:
    """T on its way to 1, at a share of training."""
    return temperature + (1 - temperature) * progress


def shortlist(student: Tensor, teacher: Tensor, tau: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Logits of the classes among the teacher's k likeliest of any row, and of all the others as one.

    Args:
        student: Logits [units, classes].
        teacher: Logits [units, classes].
        tau: Temperature at which the others' mass is kept.
        top_k: k.

    Returns:
        Student and teacher logits [units, kept + 1].
    """
    kept = torch.zeros(teacher.shape[1], dtype=torch.bool, device=teacher.device)
    kept[teacher.topk(min(top_k, teacher.shape[1]), -1).indices.flatten()] = True

    def cut(logits: Tensor) -> Tensor:
        logits = _targets.precise(logits)
        rest = tau * logits.div(tau).masked_fill(kept, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logits[:, kept], rest], -1)

    return (student, teacher) if bool(kept.all()) else (cut(student), cut(teacher))


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

    def sinkhorn(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Number of units times the distance; with several processes, this one's share of the value."""
        if not self.shared:
            size = self.config.block
            blocks = zip(torch.split(student, size), torch.split(teacher, size), strict=True)
            return torch.stack([self._problem(*block) for block in blocks]).sum()
        everyone, begin = gather_units(student)
        if everyone is student:
            return self._problem(student, teacher)
        teacher, _ = gather_units(teacher)
        rows, _ = gather_units(_terms.rows_of(batch).to(student.device))
        # a process left without rows runs one of another's, which must not count twice
        fresh = ~(rows[:, None] == rows).tril(-1).any(1)
        mine = torch.zeros_like(fresh)
        mine[begin : begin + len(student)] = True
        return self._problem(everyone[fresh], teacher[fresh], mine[fresh])

    def _problem(self, student: Tensor, teacher: Tensor, mine: Tensor | None = None) -> Tensor:
        """Units times distance; the whole gradient, but only the value of rows that are mine."""
        cfg: Config = self.config
        if student.shape[-1] > _MANY:
            student, teacher = shortlist(student, teacher, cfg.tau, cfg.top_k)
        rows = sinkhorn_rows(student, teacher, cfg.tau, cfg.eps, cfg.rounds, cfg.debiased)
        factor = 1 if cfg.mean else len(rows)
        if mine is None:
            return factor * rows.sum()
        others = rows.masked_fill(mine, 0.0).sum()
        return factor * (rows.masked_fill(~mine, 0.0).sum() + others - others.detach())
