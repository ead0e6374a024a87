"""Sinkhorn distance between two sets of distributions, and the same as a measure of blocks of tokens.

For p = softmax(z_s / tau), q = softmax(z_t / tau) over b units (Cui et al. 2024, arXiv:2402.17110, equations
4 to 8, in the form of their code):

    D[i,j] = sum over classes of |p_i - q_j|
    P      = exp(-D / eps), after `rounds` times: rows divided by their sums, then columns
    value  = sum(P * D)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kdtool.divergences._tokens import precise
from kdtool.divergences._transport import l1_cost, transported


def cost(student: Tensor, teacher: Tensor, tau: float = 2.0) -> Tensor:
    """D: L1 distances of all softened student rows to all softened teacher rows, [a, b].

    Args:
        student: Logits [a, classes].
        teacher: Logits [b, classes].
        tau: Temperature.
    """
    p, q = (precise(logits).div(tau).softmax(-1) for logits in (student, teacher))
    return l1_cost(p, q.to(p.dtype))


def sinkhorn_rows(
    student: Tensor, teacher: Tensor, tau: float = 2.0, eps: float = 0.1, rounds: int = 20, debiased: bool = False
) -> Tensor:
    """Each student row's part of sum(P * D), [a]; see `sinkhorn_distance`."""
    with torch.autocast(student.device.type, enabled=False):
        rows = transported(cost(student, teacher, tau), eps, rounds)
        if debiased:
            own = transported(cost(student, student, tau), eps, rounds)
            theirs = transported(cost(teacher, teacher, tau), eps, rounds)
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
        logits = precise(logits)
        rest = tau * logits[:, ~kept].div(tau).logsumexp(-1, keepdim=True)
        return torch.cat([logits[:, kept], rest], -1)

    return (student, teacher) if bool(kept.all()) else (cut(student), cut(teacher))


@dataclass(frozen=True, slots=True)
class Sinkhorn:
    """The distance of blocks of units, summed over their rows; couples the units of a block.

    Attributes:
        tau: Temperature of the distributions that are transported.
        eps: Entropic regularisation.
        rounds: Sinkhorn rounds.
        debiased: Subtract half of each set's distance to itself.
        mean: Leave out the factor that follows.
        top_k: With more than `many` classes, those among the teacher's k likeliest of any unit of the block
            count, the rest as one.
        many: See `top_k`.
        block: Most units of one problem. The value of a row is its part of the distance times the units of its
            block.
    """

    tau: float = 2.0
    eps: float = 0.1
    rounds: int = 20
    debiased: bool = False
    mean: bool = False
    top_k: int = 64
    many: int = 4096
    aligned: ClassVar[bool] = True
    block: int | None = 256

    def units(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Each row's part [units] of the distance of logits [units, classes]; carries the gradient of both."""
        if student.shape[-1] > self.many:
            student, teacher = shortlist(student, teacher, self.tau, self.top_k)
        return sinkhorn_rows(student, teacher, self.tau, self.eps, self.rounds, self.debiased)

    def factor(self, units: int) -> int:
        """What the distance of so many units is multiplied by."""
        return 1 if self.mean else units

    def of(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Sum over blocks of logits held as a whole, with the gradient of the student's."""
        size = self.block or max(1, len(student))
        blocks = zip(torch.split(student, size), torch.split(teacher.detach(), size), strict=True)
        return torch.stack([self.factor(len(s)) * self.units(s, t).sum() for s, t in blocks]).sum()

    @torch.enable_grad()
    def rows(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Values [units] of one block, and the gradient of their sum by the student's logits."""
        student = student.detach().requires_grad_()
        values = self.factor(len(student)) * self.units(student, teacher)
        (gradient,) = torch.autograd.grad(values.sum(), student)
        return values.detach(), gradient
