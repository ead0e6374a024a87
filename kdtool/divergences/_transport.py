"""Entropic optimal transport between two sets of distributions, with gradients written by hand.

Names: p [a, classes] and q [b, classes] are the distributions, D [a, b] their costs, eps the entropic
regularisation, K = exp(-D / eps). Rounds divide rows, then columns, by their sums, so that columns
of the plan sum to 1 and the plan to b.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_CACHED, _ON_DEVICE = 2**17, 2**25
"""Elements of a working block: what a processor's cache holds twice, and what keeps an accelerator busy."""

_WIDEST = 25.0
"""Largest D / eps for which scalings stay far inside float32: their product spans less than exp(2 * 25)."""


def _blocks(p: Tensor, q: Tensor) -> tuple[int, int]:
    """How many rows of p and of q to compare at once; of q as many as fit, in blocks of even size."""
    elements = _CACHED if p.device.type == "cpu" else _ON_DEVICE
    fitting = max(1, elements // max(1, q.shape[1]))
    wide = math.ceil(len(q) / math.ceil(len(q) / fitting))
    return max(1, min(len(p), fitting // wide)), wide


class _Cost(Function):
    """D_ij = sum over c of |p_ic - q_jc| = sum p_i + sum q_j - 2 * sum over c of min(p_ic, q_jc)."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor) -> Tensor:
        ctx.save_for_backward(p, q)
        high, wide = _blocks(p, q)
        shared = p.new_empty(len(p), len(q))
        block = p.new_empty(high, wide, p.shape[1])
        parts = torch.split(p[:, None], high)
        for others, column in zip(torch.split(q, wide), torch.split(shared, wide, 1), strict=True):
            for part, cell in zip(parts, torch.split(column, high), strict=True):
                least = block[: len(part), : len(others)]
                torch.minimum(part, others, out=least)
                torch.sum(least, -1, out=cell)
        return (p.sum(-1)[:, None] + q.sum(-1) - 2 * shared).clamp_min_(0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        p, q = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return _pull(p, q, grad) if wanted[0] else None, _pull(q, p, grad.T) if wanted[1] else None


def _pull(p: Tensor, q: Tensor, grad: Tensor) -> Tensor:
    """Gradient of sum(grad * D) by p: sum over j of grad_ij * sign(p_ic - q_jc), [a, classes].

    Written with sign = 2 * [p > q] - 1. Equal entries count as below: of a row equal to another all
    classes then get the same value, which the gradient of a softmax does not see.
    """
    high, wide = _blocks(p, q)
    result, block = torch.zeros_like(p), p.new_empty(high, wide, p.shape[1])
    parts, sums = torch.split(p[:, None], high), torch.split(result[:, None], high)
    for others, column in zip(torch.split(q, wide), torch.split(grad[:, None], wide, 2), strict=True):
        for part, total, cell in zip(parts, sums, torch.split(column, high), strict=True):
            above = block[: len(part), : len(others)]
            torch.gt(part, others, out=above)
            total.baddbmm_(cell, above)
    return result.mul_(2.0).sub_(grad.sum(-1, keepdim=True))


def l1_cost(p: Tensor, q: Tensor) -> Tensor:
    """L1 distances between all rows of two sets of distributions.

    Never holds [a, b, classes] values: time is O(a * b * classes), memory O(a * b) and one block.

    Args:
        p: [a, classes], rows of one sum.
        q: [b, classes], in the same float type.

    Returns:
        [a, b], between 0 and 2 for probabilities; differentiable once by either.
    """
    cost: Tensor = _Cost.apply(p, q)  # type: ignore[no-untyped-call]
    return cost


def plan(cost: Tensor, eps: float, rounds: int) -> Tensor:
    """The transport plan [a, b] after some rounds, in the log domain: finite for any eps > 0.

    Args:
        cost: [a, b]
        eps: Entropic regularisation, in units of the cost.
        rounds: How often rows, then columns are normalised; at least 1.
    """
    log_kernel = -cost / eps
    log_v = log_kernel.new_zeros(log_kernel.shape[1])
    for _ in range(rounds):
        log_u = -torch.logsumexp(log_kernel + log_v, 1, keepdim=True)
        log_v = -torch.logsumexp(log_kernel + log_u, 0)
    return (log_kernel + log_u + log_v).exp()


class _Transport(Function):
    """Row sums of P * D, with P from scalings u, v of the kernel: the plan's rounds at the cost of products
    of a matrix and a vector, and the gradient through all of them as one product of matrices.
    """

    @staticmethod
    def forward(ctx: Any, cost: Tensor, eps: float, rounds: int) -> Tensor:
        kernel = torch.exp(cost / -eps)
        us, vs = cost.new_empty(rounds, cost.shape[0]), cost.new_ones(rounds + 1, cost.shape[1])
        for k in range(rounds):
            torch.reciprocal(kernel @ vs[k], out=us[k])
            torch.reciprocal(us[k] @ kernel, out=vs[k + 1])
        ctx.save_for_backward(cost, kernel, us, vs)
        ctx.eps = eps
        return (kernel * cost) @ vs[-1] * us[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cost, kernel, us, vs = ctx.saved_tensors
        rounds = len(us)
        direct = (grad * us[-1])[:, None] * kernel * vs[-1]  # P weighted by the gradient of its row
        by_log_plan = direct * cost
        by_log_v = by_log_plan.sum(0)
        xs, ys = torch.empty_like(vs[1:]), torch.empty_like(us)
        for k in reversed(range(rounds)):
            # log v = -log(K^T u): moves against log u and log K by the shares of each column; log u alike
            torch.mul(by_log_v, vs[k + 1], out=xs[k])
            by_log_u = us[k] * torch.mv(kernel, xs[k])
            if k == rounds - 1:
                by_log_u -= by_log_plan.sum(1)
            torch.mul(by_log_u, -us[k], out=ys[k])
            by_log_v = -vs[k] * torch.mv(kernel.T, ys[k])
        through = us.T @ xs + ys.T @ vs[:-1]
        by_log_kernel = by_log_plan.sub_(kernel * through)
        return direct.sub_(by_log_kernel / ctx.eps), None, None


def transported(cost: Tensor, eps: float, rounds: int) -> Tensor:
    """Cost that the plan moves for each row: sum over j of P_ij * D_ij, [a].

    The gradient goes through plan and cost, as if all rounds were differentiated.

    Args:
        cost: [a, b], between 0 and 2.
        eps: Entropic regularisation.
        rounds: See `plan`; at least 1.
    """
    if 2.0 / eps > _WIDEST:
        return (plan(cost, eps, rounds) * cost).sum(1)
    rows: Tensor = _Transport.apply(cost, eps, rounds)  # type: ignore[no-untyped-call]
    return rows
