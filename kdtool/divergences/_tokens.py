"""Divergences between next-token distributions, each with its gradient written out.

q is the student, p the teacher. With z the logits that softmax takes and g the derivative by q, the
gradient is q * (g - sum(q g)); forward KL has the shorter q - p.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

Kind = Literal["forward-kl", "reverse-kl", "jsd", "tvd", "skewed-kl", "skewed-reverse-kl", "cross-entropy"]
KINDS: tuple[str, ...] = get_args(Kind)

LEAST = -1e4
"""Log-probabilities stay finite where a logit is -inf, so that 0 * log 0 is 0."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which divergence, and its parameters.

    Attributes:
        kind: forward-kl is KL(p||q); reverse-kl is KL(q||p); jsd is beta KL(p||m) + (1-beta) KL(q||m) with
            m = beta p + (1-beta) q; tvd is half the L1 distance; skewed-kl is KL(p || a p + (1-a) q);
            skewed-reverse-kl is KL(q || (1-a) p + a q); cross-entropy is -sum(p log q), forward KL plus the
            entropy of p.
        beta: Of jsd, in [0, 1]; 0 is defined as KL(p||q), 1 as KL(q||p).
        skew: a of the skewed kinds, in [0, 1).
        temperature: Divides both logits; there is no factor T^2.
    """

    kind: Kind = "forward-kl"
    beta: float = 0.5
    skew: float = 0.1
    temperature: float = 1.0

    aligned: ClassVar[bool] = True
    """Whether columns of both logits are the same tokens."""
    block: ClassVar[int | None] = None
    """Most rows that make one problem; None where each row stands for itself."""

    def rows(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Value of each row and its gradient by the student's logits.

        Args:
            student: Logits [rows, vocabulary], float32 or float64; overwritten.
            teacher: The same shape and type; overwritten.

        Returns:
            Values [rows] and gradients [rows, vocabulary].
        """
        if self.temperature != 1.0:
            student.div_(self.temperature)
            teacher.div_(self.temperature)
        value, gradient = self.apart(student, normalize_(student), teacher, normalize_(teacher))
        return value, gradient if self.temperature == 1.0 else gradient.div_(self.temperature)

    def apart(self, log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Value [rows] and gradient [rows, outcomes] by the logits of q; all four [rows, outcomes] are overwritten."""
        kind = self.kind
        if kind == "jsd" and self.beta in (0.0, 1.0):
            kind = "forward-kl" if self.beta == 0.0 else "reverse-kl"
        if kind == "forward-kl":
            return _dot(p, log_p.sub_(log_q)), q.sub_(p)
        if kind == "cross-entropy":
            return -_dot(p, log_q), q.sub_(p)
        if kind == "reverse-kl":
            return centred(q, log_q.sub_(log_p))
        if kind == "tvd":
            apart = torch.sub(q, p, out=log_p)
            value = apart.abs().sum(-1).mul_(0.5)
            return value, centred(q, apart.sign_().mul_(0.5))[1]
        own = {"jsd": 1 - self.beta, "skewed-kl": 1 - self.skew}.get(kind, self.skew)
        mixed = torch.lerp(p, q, own).clamp_min_(torch.finfo(q.dtype).tiny)
        if kind == "skewed-kl":
            slope = torch.div(p, mixed, out=log_q).mul_(-own)
            return _dot(p, log_p.sub_(mixed.log_())), centred(q, slope)[1]
        if kind == "skewed-reverse-kl":
            slope = torch.div(q, mixed, out=log_p).mul_(-own)
            apart = log_q.sub_(mixed.log_())
            value = _dot(q, apart)
            return value, centred(q, slope.add_(apart))[1]
        mixed.log_()
        other = _dot(p, log_p.sub_(mixed))
        value, gradient = centred(q, log_q.sub_(mixed))
        return value.mul_(own).add_(other, alpha=self.beta), gradient.mul_(own)


def precise(values: Tensor) -> Tensor:
    """Values in the format losses are computed in: float64 stays, everything else becomes float32."""
    return values if values.dtype == torch.float64 else values.float()


def normalize_(z: Tensor) -> Tensor:
    """Turn logits [rows, outcomes] into finite log-probabilities in place; gives the probabilities."""
    z.sub_(z.amax(-1, keepdim=True))
    likely = z.exp()
    mass = likely.sum(-1, keepdim=True)
    z.sub_(mass.log()).clamp_min_(LEAST)
    return likely.div_(mass)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows, [rows]."""
    found: Tensor = torch.linalg.vecdot(left, right)
    return found


def centred(q: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of g under q, [rows], and q * (g - mean), [rows, outcomes], which overwrites g."""
    mean = _dot(q, g)
    return mean, g.sub_(mean[:, None]).mul_(q)


class _Dense(torch.autograd.Function):
    """Sum over rows of a divergence between given logits."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, which: Divergence) -> Tensor:
        exact = torch.float64 if student.dtype == torch.float64 else torch.float32
        value, gradient = which.rows(*(z.detach().to(exact, copy=True) for z in (student, teacher)))
        ctx.save_for_backward(gradient.to(student.dtype))
        return value.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
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
