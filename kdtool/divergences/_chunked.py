"""Divergences of language models from hidden states, some rows at a time.

Logits of a chunk are made, compared, turned into the gradient by hidden states and head, and dropped,
so nothing of size [tokens, vocabulary] outlives its chunk. Callers drop positions that do not count first.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kdtool.divergences._tokens import Divergence


@dataclass(frozen=True, slots=True)
class Head:
    """What turns hidden states into logits: cap * tanh(scale * (h W^T + b) / cap).

    Attributes:
        weight: W [vocabulary, width]; tied to the input embedding or not.
        bias: b [vocabulary], or None.
        scale: Factor of the logits.
        cap: Soft cap, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocabulary] of hidden states [rows, width], in the format of the head."""
        found = functional.linear(hidden, self.weight, self.bias) * self.scale
        return found if self.cap is None else self.cap * torch.tanh(found / self.cap)

    def cut(self, vocabulary: int) -> "Head":
        """The head of the first `vocabulary` tokens, without the padding that makes heads a round size."""
        if vocabulary >= len(self.weight):
            return self
        bias = None if self.bias is None else self.bias[:vocabulary]
        return Head(self.weight[:vocabulary], bias, self.scale, self.cap)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Constants of a comparison."""

    which: Divergence
    scale: float
    cap: float | None
    weight: float
    ce_weight: float
    rows: int


class _Compare(torch.autograd.Function):
    """ce_weight * cross-entropy + weight * divergence, gradients made along with the value."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        teacher: tuple[Tensor, Head] | None,
        labels: Tensor | None,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        head = Head(matrix, bias, plan.scale, plan.cap)
        sums = hidden.new_zeros(2, dtype=exact)  # cross-entropy, divergence
        wanted = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_matrix = torch.zeros_like(matrix, dtype=exact) if wanted[1] else None
        d_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and wanted[2] else None
        for start in range(0, len(hidden), plan.rows):
            part = slice(start, start + plan.rows)
            z = head.logits(hidden[part]).to(exact)
            d_z = torch.zeros_like(z)
            if teacher is not None and plan.weight:
                value, found = plan.which.rows(z, teacher[1].logits(teacher[0][part]).to(exact))
                sums[1] += value.sum()
                d_z.add_(found, alpha=plan.weight)
            if labels is not None and plan.ce_weight:
                log_q = torch.log_softmax(z, -1)
                own = labels[part, None]
                sums[0] -= log_q.gather(1, own).sum()
                found = log_q.exp_()
                found.scatter_add_(1, own, torch.full_like(own, -1, dtype=exact))
                d_z.add_(found, alpha=plan.ce_weight)
            if plan.cap is not None:
                d_z.mul_(1 - (z / plan.cap).square_())
            d_z = d_z.mul_(plan.scale).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[part] = (d_z @ matrix.to(hidden.dtype)).to(hidden.dtype)
            if d_matrix is not None:
                d_matrix += d_z.T @ hidden[part]
            if d_bias is not None:
                d_bias += d_z.sum(0)
        kept = (d_hidden, None if d_matrix is None else d_matrix.to(matrix.dtype))
        ctx.save_for_backward(*kept, d_bias if bias is None or d_bias is None else d_bias.to(bias.dtype))
        total = plan.ce_weight * sums[0] + plan.weight * sums[1]
        ce, apart = sums.unbind()
        ctx.mark_non_differentiable(ce, apart)
        return total, ce, apart

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if found is None else found * grad.to(found.dtype) for found in ctx.saved_tensors]
        return (*scaled, None, None, None)


def compare(
    hidden: Tensor,
    head: Head,
    teacher: tuple[Tensor, Head] | None = None,
    labels: Tensor | None = None,
    which: Divergence | None = None,
    weight: float = 1.0,
    ce_weight: float = 0.0,
    rows: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare a student with a teacher and with labels, without holding all logits.

    Args:
        hidden: The student's hidden states [tokens, width]; only tokens that count.
        head: The student's head.
        teacher: The teacher's hidden states [tokens, its width] and head; its vocabulary has the same size.
        labels: Token ids [tokens].
        which: The divergence; forward KL by default.
        weight: Of the divergence.
        ce_weight: Of the cross-entropy with the labels.
        rows: Tokens in a chunk.

    Returns:
        The weighted sum over tokens, which carries the gradient, and the unweighted sums of cross-entropy and
        divergence, which do not; in float32, or float64 for float64 hidden states.
    """
    plan = _Plan(which or Divergence(), head.scale, head.cap, weight, ce_weight, rows)
    if teacher is not None:
        teacher = (teacher[0].detach(), teacher[1])
    total, ce, apart = _Compare.apply(hidden, head.weight, head.bias, teacher, labels, plan)  # type: ignore[no-untyped-call]
    return total, ce, apart
