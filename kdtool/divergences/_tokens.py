"""Divergences between next-token distributions, each with its gradient written out.

q is the student, p the teacher. With z the logits that softmax takes and g the derivative by q, the
gradient is q * (g - sum(q g)); forward KL has the shorter q - p.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Kind = Literal["forward-kl", "reverse-kl", "jsd", "tvd", "skewed-kl", "skewed-reverse-kl"]
KINDS: tuple[str, ...] = get_args(Kind)

_LEAST = -1e4  # log-probabilities stay finite where a logit is -inf, so that 0 * log 0 is 0


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which divergence, and its parameters.

    Attributes:
        kind: forward-kl is KL(p||q); reverse-kl is KL(q||p); jsd is beta KL(p||m) + (1-beta) KL(q||m) with
            m = beta p + (1-beta) q; tvd is half the L1 distance; skewed-kl is KL(p || a p + (1-a) q);
            skewed-reverse-kl is KL(q || (1-a) p + a q).
        beta: Of jsd, in [0, 1]; 0 is defined as KL(p||q), 1 as KL(q||p).
        skew: a of the skewed kinds, in [0, 1).
        temperature: Divides both logits; there is no factor T^2.
    """

    kind: Kind = "forward-kl"
    beta: float = 0.5
    skew: float = 0.1
    temperature: float = 1.0

    def rows(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Value of each row and its gradient by the student's logits.

        Args:
            student: Logits [rows, vocabulary], float32 or float64.
            teacher: The same shape and type.

        Returns:
            Values [rows] and gradients [rows, vocabulary].
        """
        log_q, log_p = (
            torch.log_softmax(z / self.temperature, -1).clamp_min_(_LEAST) for z in (student.detach(), teacher.detach())
        )
        value, gradient = self._rows(log_q, log_p)
        return value, gradient if self.temperature == 1.0 else gradient / self.temperature

    def _rows(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        kind = self.kind
        if kind == "jsd" and self.beta in (0.0, 1.0):
            kind = "forward-kl" if self.beta == 0.0 else "reverse-kl"
        q, p = log_q.exp(), log_p.exp()
        if kind == "forward-kl":
            return (p * (log_p - log_q)).sum(-1), q - p
        if kind == "reverse-kl":
            return _weighted(q, log_q - log_p)
        if kind == "jsd":
            mixed = (self.beta * p + (1 - self.beta) * q).clamp_min_(torch.finfo(q.dtype).tiny).log_()
            own, gradient = _weighted(q, log_q - mixed)
            other = (p * (log_p - mixed)).sum(-1)
            return self.beta * other + (1 - self.beta) * own, (1 - self.beta) * gradient
        if kind == "tvd":
            return 0.5 * (p - q).abs().sum(-1), _weighted(q, 0.5 * (q - p).sign())[1]
        if kind == "skewed-kl":
            mixed = (self.skew * p + (1 - self.skew) * q).clamp_min_(torch.finfo(q.dtype).tiny)
            return (p * (log_p - mixed.log())).sum(-1), _weighted(q, (self.skew - 1) * p / mixed)[1]
        mixed = ((1 - self.skew) * p + self.skew * q).clamp_min_(torch.finfo(q.dtype).tiny)
        apart = log_q - mixed.log()
        return (q * apart).sum(-1), _weighted(q, apart - self.skew * q / mixed)[1]


def _weighted(q: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of g under q, [rows], and q * (g - mean), [rows, vocabulary]."""
    mean = (q * g).sum(-1)
    return mean, q * (g - mean[:, None])


class _Dense(torch.autograd.Function):
    """Sum over rows of a divergence between given logits."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, which: Divergence) -> Tensor:
        exact = student.dtype == torch.float64
        z_s, z_t = (z.double() if exact else z.float() for z in (student, teacher))
        value, gradient = which.rows(z_s, z_t)
        ctx.save_for_backward(gradient.to(student.dtype))
        return value.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


def divergence(student: Tensor, teacher: Tensor, which: Divergence) -> Tensor:
    """A divergence of given logits as a sum over rows; the teacher gets no gradient.

    Args:
        student: [rows, vocabulary]; computed in float32, or float64 for float64.
        teacher: The same shape.
        which: The divergence.
    """
    found: Tensor = _Dense.apply(student, teacher, which)  # type: ignore[no-untyped-call]
    return found
