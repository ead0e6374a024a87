"""Time of the optimiser step of weight-inherited distillation against its formula, written out operation by operation.

One compactor as wide as MiniLM's feed-forward layers, in one process and in turn; prints the ratio of the least
processor times and the largest difference after one step.

Usage: OMP_NUM_THREADS=1 python -m tests.benchmarks.wid_step [WIDTH]
"""

import sys
import time

import torch
from torch import Tensor

from kdtool.compressors._wid_step import Adam, step

TURNS = 12


def formula(parameter: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, adam: Adam) -> None:
    """AdamW without bias correction."""
    first, second = adam.betas
    exp_avg.mul_(first).add_(grad, alpha=1 - first)
    exp_avg_sq.mul_(second).addcmul_(grad, grad, value=1 - second)
    parameter.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(adam.eps), value=-adam.lr)


def drawn(width: int) -> list[Tensor]:
    """Parameter, gradient and moments."""
    draw = torch.Generator().manual_seed(0)
    return [torch.rand(width, width, generator=draw) for _ in range(4)]


def main(width: int) -> None:
    """Print one line."""
    sides = {"formula": (formula, drawn(width)), "step": (step, drawn(width))}
    adam, least = Adam(1e-3), dict.fromkeys(sides, float("inf"))
    for turn in range(TURNS):
        for name, (run, tensors) in sides.items():
            began = time.process_time()
            run(*tensors, adam)
            least[name] = min(least[name], time.process_time() - began)
        if not turn:
            away = max(float((a - b).abs().max()) for a, b in zip(sides["formula"][1], sides["step"][1], strict=True))
    print(f"{width} x {width}: {least['formula'] / least['step']:.2f} times as fast, largest difference {away:.1e}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1536)
