"""The optimiser step of weight-inherited distillation: a penalty in Adam's first moment (WID, section 3.4)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Role = Literal["in", "out", "bias"]


@dataclass(frozen=True, slots=True)
class Adam:
    """Settings of AdamW without bias correction; decay is decoupled and applied after the step."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0


def dropped_entries(parameter: Tensor, keep: Tensor, role: Role) -> Tensor:
    """Mask of the entries that a keep-set drops: columns of an in-compactor, rows of an out-compactor.

    Args:
        parameter: [n, n], or [n] for a bias.
        keep: [n] bool.
        role: What the parameter is.

    Returns:
        Bool, in the shape of the parameter.
    """
    gone = ~keep.bool()
    if role == "in":
        gone = gone.unsqueeze(0)
    elif role == "out":
        gone = gone.unsqueeze(1)
    return gone.expand_as(parameter)


def penalise(parameter: Tensor, grad: Tensor, exp_avg: Tensor, gone: Tensor, strength: float) -> Tensor:
    """Pull dropped entries towards zero, through the gradient and through the first moment.

    A strength of at most 1 acts through the gradient alone; above it the moment is changed in place, too.
    Injecting into it, and not into the second moment, is what makes a strength above 1 matter under Adam's
    normalisation; kept entries decay once more as a side effect.

    Returns:
        The gradient to step with.
    """
    if strength > 1.0:
        exp_avg.mul_(0.9).add_(torch.where(gone, 0.1 * (strength - 1.0) * parameter, 0.0))
    return torch.where(gone, min(strength, 1.0) * parameter, grad)


def shrink(parameter: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a compactor during the first interval: an L2 penalty on all its entries."""
    return grad + parameter


@torch.no_grad()
def step(parameter: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, adam: Adam) -> None:
    """One AdamW step in place, without bias correction."""
    first, second = adam.betas
    exp_avg.mul_(first).add_(grad, alpha=1 - first)
    exp_avg_sq.mul_(second).addcmul_(grad, grad, value=1 - second)
    parameter.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(adam.eps), value=-adam.lr)
    if adam.weight_decay:
        parameter.add_(parameter, alpha=-adam.lr * adam.weight_decay)
