"""The optimiser step of weight-inherited distillation: a penalty in Adam's first moment (WID, section 3.4)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

Role = Literal["in", "out", "bias"]

_LATE = 1e9
"""A step at which the corrections 1 - beta^step are 1; one kernel then reads and writes each number once."""


@dataclass(frozen=True, slots=True)
class Adam:
    """Settings of AdamW without bias correction; decay is decoupled and applied after the step."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0


def dropped_entries(keep: Tensor, role: Role) -> Tensor:
    """Mask of the entries that a keep-set drops: columns of an in-compactor, rows of an out-compactor.

    Args:
        keep: [n] bool.
        role: What the parameter is: a compactor [n, n], or a bias [n].

    Returns:
        Bool, of a shape that broadcasts to that of the parameter.
    """
    gone = ~keep.bool()
    return gone if role == "bias" else gone.unsqueeze(0 if role == "in" else 1)


def penalise(parameter: Tensor, grad: Tensor, exp_avg: Tensor, gone: Tensor, strength: float) -> Tensor:
    """Pull dropped entries towards zero, through the gradient and through the first moment.

    A strength of at most 1 acts through the gradient alone; above it the moment is changed in place, too.
    Injecting into it, and not into the second moment, is what makes a strength above 1 matter under Adam's
    normalisation; kept entries decay once more as a side effect.

    Returns:
        The gradient to step with.
    """
    if strength > 1.0:
        exp_avg.mul_(0.9).addcmul_(gone.to(parameter.dtype), parameter, value=0.1 * (strength - 1.0))
    return torch.where(gone, parameter if strength >= 1.0 else strength * parameter, grad)


def shrink(parameter: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a compactor during the first interval: an L2 penalty on all its entries."""
    return grad + parameter


@torch.no_grad()
def step(parameter: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, adam: Adam) -> None:
    """One AdamW step in place, without bias correction: torch's own, so late that nothing is left to correct."""
    first, second = adam.betas
    late = torch.tensor(_LATE, device=parameter.device)
    adamw(
        [parameter],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [late],
        fused=True,
        amsgrad=False,
        beta1=first,
        beta2=second,
        lr=adam.lr,
        weight_decay=0.0,
        eps=adam.eps,
        maximize=False,
    )
    if adam.weight_decay:
        parameter.add_(parameter, alpha=-adam.lr * adam.weight_decay)


def left_of_one(rates: Sequence[float], strength: float, interval: int, ends: int) -> float:
    """What training leaves of an entry of 1 that is dropped when the schedule ends, if the loss does not hold it.

    Args:
        rates: Learning rate of each step.
        strength: lambda of the penalty.
        interval: Steps of the first interval, in which all entries are pulled.
        ends: Step, counted from 1, at which the entry is dropped.
    """
    first, second = Adam(0.0).betas
    entry, mean, square = 1.0, 0.0, 0.0
    for number, rate in enumerate(rates, 1):
        pull = entry if number <= interval or number >= ends else 0.0
        if number >= ends and strength > 1.0:
            mean = first * mean + (1 - first) * (strength - 1.0) * entry
        grad = pull * min(strength, 1.0) if number >= ends else pull
        mean, square = first * mean + (1 - first) * grad, second * square + (1 - second) * grad**2
        entry -= rate * mean / (math.sqrt(square) + Adam(0.0).eps)
    return abs(entry)


class PenalisedAdamW(torch.optim.Optimizer):
    """AdamW without bias correction whose moments see the penalty on what is dropped.

    Args:
        groups: With `params`, `lr` and `weight_decay`.
        roles: Each parameter that loses something, with what it is and the name of its keep-set.
        strength: lambda of the penalty.
    """

    masks: Mapping[str, Tensor]
    """Keep-set to bool [n]; set before each step."""
    phase: Literal["warm", "active"]
    """`warm` shrinks all of every compactor, `active` pulls what is dropped towards zero."""

    def __init__(
        self, groups: list[dict[str, Any]], roles: list[tuple[nn.Parameter, Role, str]], strength: float
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.roles: dict[Tensor, tuple[Role, str]] = {parameter: (role, name) for parameter, role, name in roles}
        self.strength = strength
        self.masks, self.phase = {}, "warm"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override] # no closure is ever given
        """One step; parameters without gradient stay."""
        for group in self.param_groups:
            adam = Adam(group["lr"], weight_decay=group["weight_decay"])
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
                grad = self._with_penalty(parameter, state["exp_avg"])
                step(parameter, grad, state["exp_avg"], state["exp_avg_sq"], adam)

    def _with_penalty(self, parameter: Tensor, exp_avg: Tensor) -> Tensor:
        """The gradient to step with."""
        grad: Tensor = parameter.grad  # type: ignore[assignment] # asked before
        if parameter not in self.roles:
            return grad
        role, name = self.roles[parameter]
        if self.phase == "active":
            gone = dropped_entries(self.masks[name], role)
            return penalise(parameter, grad, exp_avg, gone, self.strength)
        return grad if role == "bias" else shrink(parameter, grad)
