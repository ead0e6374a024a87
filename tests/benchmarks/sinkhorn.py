"""Seconds of the Sinkhorn term, forward and backward, as ratios to plain torch formulations of it.

Everything runs in this process, in turns, so that a machine that is busy for a while slows all. Before
anything is timed, all must give the same distance and gradient to 1e-5.

    OMP_NUM_THREADS=1 python tests/benchmarks/sinkhorn.py
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kdtool.divergences import sinkhorn_distance

TAU, EPS, ROUNDS = 2.0, 0.1, 20
GOAL, TOLERANCE = 2.0, 1e-5


def rounds_of(cost: Tensor) -> Tensor:
    """The distance as the formulas say it: 20 times rows, then columns, divided by their sums."""
    plan = (-cost / EPS).exp()
    for _ in range(ROUNDS):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum()


def broadcast(student: Tensor, teacher: Tensor) -> Tensor:
    """All differences at once, [b, b, classes], and autograd."""
    p, q = (student / TAU).softmax(-1), (teacher / TAU).softmax(-1)
    return rounds_of((p[:, None] - q[None]).abs().sum(-1))


def with_cdist(student: Tensor, teacher: Tensor) -> Tensor:
    """Torch's own kernel for the cost, and autograd."""
    return rounds_of(torch.cdist((student / TAU).softmax(-1), (teacher / TAU).softmax(-1), p=1.0))


def ours(student: Tensor, teacher: Tensor) -> Tensor:
    return sinkhorn_distance(student, teacher, TAU, EPS, ROUNDS)


KDTOOL = "kdtool"
FORMS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    KDTOOL: ours,
    "straightforward, broadcast": broadcast,
    "straightforward, torch.cdist": with_cdist,
}


@dataclass
class Problem:
    """Logits of one batch."""

    student: Tensor
    teacher: Tensor

    @classmethod
    def make(cls, batch: int, classes: int) -> "Problem":
        generator = torch.Generator().manual_seed(0)
        teacher = 3 * torch.randn(batch, classes, generator=generator)
        student = teacher + 2 * torch.randn(batch, classes, generator=generator)
        return cls(student.requires_grad_(), teacher)

    def run(self, form: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Distance and gradient."""
        value = form(self.student, self.teacher)
        (gradient,) = torch.autograd.grad(value, self.student)
        return value.detach(), gradient


def check_same(problem: Problem) -> float:
    """Largest relative difference of distance or gradient to the first peer; stops where it is too large."""
    value, gradient = problem.run(broadcast)
    worst = 0.0
    for form in FORMS.values():
        found, slope = problem.run(form)
        worst = max(worst, float((found - value).abs() / value), float((slope - gradient).norm() / gradient.norm()))
    if not worst <= TOLERANCE:
        raise SystemExit(f"the forms differ by {worst:.1e}, more than {TOLERANCE:.0e}")
    return worst


def measure(problem: Problem, repeats: int) -> dict[str, list[float]]:
    """Processor seconds of each form, one entry a round; the order changes by round."""
    names = list(FORMS)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.process_time()
            problem.run(FORMS[name])
            seconds[name].append(time.process_time() - began)
    return seconds


def report(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Print a table; return how many times slower than kdtool each peer is, by medians."""
    base = statistics.median(seconds[KDTOOL])
    ratios = {name: statistics.median(values) / base for name, values in seconds.items()}
    for name, values in seconds.items():
        middle, best = statistics.median(values), min(values)
        print(f"{name:30} {1e3 * middle:9.1f} ms median {1e3 * best:9.1f} ms best {ratios[name]:7.2f} x")
    return {name: ratio for name, ratio in ratios.items() if name != KDTOOL}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    problem = Problem.make(options.batch, options.classes)
    threads = torch.get_num_threads()
    print(f"b = {options.batch}, C = {options.classes}, {ROUNDS} rounds, float32, threads: {threads}")
    print(f"largest relative difference of distance and gradient: {check_same(problem):.1e}")
    ratios = report(measure(problem, options.repeats))
    missed = [name for name, ratio in ratios.items() if ratio < GOAL]
    print(f"goal of {GOAL:g} x " + (f"missed against: {', '.join(missed)}" if missed else "met against all"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
