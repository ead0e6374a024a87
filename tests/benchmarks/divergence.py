"""Memory and time of one distillation step of a language model's head, as ratios to named peers.

A step is both heads on given hidden states, the loss and the backward pass, in float32 on one thread: 1,024
tokens of which 768 count, student width 192, teacher width 384. Every form runs in a process of its own, one
after the other, in rounds; all must give the same loss and gradients. Memory is the peak of the process's
resident set above what it held before its first step (VmHWM, reset before), time the processor time of a step.

    OMP_NUM_THREADS=1 python tests/benchmarks/divergence.py --peers PYTHON

PYTHON is an interpreter that has trl 1.16 and liger-kernel 0.8.5; without one these peers are left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

KINDS = {"forward-kl": 0.0, "jsd": 0.5}
"""Divergence to beta of the generalised Jensen-Shannon divergence."""
KDTOOL, NAIVE = "kdtool", "plain, whole logits"
MEMORY_GOAL, SPEED_GOAL, TOLERANCE = 8.0, 2.0, 1e-4


@dataclass
class Problem:
    """Inputs of a step."""

    student: Tensor
    teacher: Tensor
    head: Tensor
    teacher_head: Tensor
    counts: Tensor

    @classmethod
    def make(cls, vocabulary: int, tokens: int = 1024, width: int = 192, wider: int = 384) -> "Problem":
        normal = torch.Generator().manual_seed(0)
        hidden, there = torch.randn(tokens, width, generator=normal), torch.randn(tokens, wider, generator=normal)
        head = 0.1 * torch.randn(vocabulary, width, generator=normal)
        other = 0.1 * torch.randn(vocabulary, wider, generator=normal)
        counts = torch.arange(tokens) % 4 != 0
        return cls(hidden.requires_grad_(), there, head.requires_grad_(), other, counts)

    def valid(self) -> "Problem":
        """Only tokens that count."""
        everyone = self.counts[self.counts]
        return Problem(self.student[self.counts], self.teacher[self.counts], self.head, self.teacher_head, everyone)


def ours(problem: Problem, kind: str) -> Tensor:
    """Sum over tokens of kdtool's chunked form."""
    from kdtool.divergences import Divergence, Head, compare

    p = problem.valid()
    return compare(p.student, Head(p.head), (p.teacher, Head(p.teacher_head)), which=Divergence(kind))[0]  # type: ignore[arg-type]


def naive(problem: Problem, kind: str) -> Tensor:
    """Whole logits of both models, softmax, divergence, mask: what a plain training loop does."""
    log_q = (problem.student @ problem.head.T).log_softmax(-1)
    with torch.no_grad():
        log_p = (problem.teacher @ problem.teacher_head.T).log_softmax(-1)
    if kind == "forward-kl":
        each = functional.kl_div(log_q, log_p, reduction="none", log_target=True)
    else:
        half = torch.tensor(0.5).log()
        mixed = torch.logsumexp(torch.stack([log_q + half, log_p + half]), 0)
        left, right = (functional.kl_div(mixed, one, reduction="none", log_target=True) for one in (log_p, log_q))
        each = 0.5 * left + 0.5 * right
    return (each.sum(-1) * problem.counts).sum()


def with_trl(problem: Problem, kind: str) -> Tensor:
    """The loss of TRL's DistillationTrainer, which on a CPU projects every position."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    p = problem
    mask = p.counts[None].long()
    found, *_ = _chunked_divergence_loss(
        p.student[None], p.teacher[None], p.head, p.teacher_head, mask, KINDS[kind], num_items_in_batch=1
    )
    return found


def with_liger(problem: Problem, kind: str) -> Tensor:
    """Liger's fused linear layer and Jensen-Shannon divergence, without compilation."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    p = problem
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=KINDS[kind], compiled=False)
    labels = torch.where(p.counts, 0, -100)
    return loss(p.student, p.head, p.teacher, p.teacher_head, labels) * p.counts.sum()


FORMS: dict[str, Callable[[Problem, str], Tensor]] = {
    KDTOOL: ours,
    NAIVE: naive,
    "TRL": with_trl,
    "TRL, given valid tokens only": lambda p, kind: with_trl(p.valid(), kind),
    "Liger": with_liger,
    "Liger, given valid tokens only": lambda p, kind: with_liger(p.valid(), kind),
}
PEERS = [name for name in FORMS if name.startswith(("TRL", "Liger"))]


@dataclass
class Measured:
    """What a process found.

    Attributes:
        loss: Sum over tokens.
        gradients: Norms of those of hidden states and head.
        mebibytes: Peak above what was held before.
        seconds: Processor time of each step.
    """

    loss: float
    gradients: list[float]
    mebibytes: float
    seconds: list[float]


def _held(name: str) -> float:
    """A figure of this process's memory in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) / 1024


def measure(name: str, kind: str, vocabulary: int, steps: int) -> Measured:
    """Run one form in this process."""
    form = FORMS[name]

    def step(problem: Problem) -> Tensor:
        problem.head.grad = problem.student.grad = None
        loss = form(problem, kind)
        (loss / problem.counts.sum()).backward()
        return loss.detach()

    step(Problem.make(64, 32))  # imports and first calls
    problem, seconds, peak = Problem.make(vocabulary), [], 0.0
    for turn in range(steps):
        if turn == 0:
            Path("/proc/self/clear_refs").write_text("5")
            before = _held("VmRSS")
        began = time.process_time()
        loss = step(problem)
        seconds.append(time.process_time() - began)
        peak = peak or _held("VmHWM") - before
    assert problem.head.grad is not None
    assert problem.student.grad is not None
    norms = [float(grad.norm()) for grad in (problem.student.grad, problem.head.grad)]
    return Measured(float(loss), norms, peak, seconds)


def in_a_process(python: str, name: str, kind: str, vocabulary: int, steps: int) -> Measured | None:
    """Run one form in a process of its own; None where a peer is not installed there."""
    words = [python, __file__, "--one", name, "--kinds", kind, "--vocabularies", str(vocabulary), "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if name not in PEERS:
            raise SystemExit(f"{name}: {last}")
        print(f"{name} is left out: {last}")
        return None
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def check_same(found: dict[str, Measured]) -> float:
    """Largest relative difference of loss or gradient norms to the plain form; stops where it is too large."""
    base = found[NAIVE]
    worst = 0.0
    for one in found.values():
        pairs = zip([one.loss, *one.gradients], [base.loss, *base.gradients], strict=True)
        worst = max(worst, *(abs(left - right) / abs(right) for left, right in pairs))
    if not worst <= TOLERANCE:
        raise SystemExit(f"the forms differ by {worst:.1e}, more than {TOLERANCE:.0e}")
    return worst


def report(found: dict[str, list[Measured]]) -> list[str]:
    """Print a table and say which goals are missed."""
    memory = {name: statistics.median(one.mebibytes for one in rounds) for name, rounds in found.items()}
    best = {name: statistics.median(s for one in rounds for s in one.seconds) for name, rounds in found.items()}
    missed = []
    for name in found:
        less, faster = memory[name] / memory[KDTOOL], best[name] / best[KDTOOL]
        print(f"  {name:32}{memory[name]:9.0f} MiB {less:6.1f} x {best[name]:9.2f} s {faster:6.1f} x")
        least = {KDTOOL: (0.0, 0.0), NAIVE: (MEMORY_GOAL, SPEED_GOAL)}.get(name, (1.0, 1.0))
        missed += [f"memory against {name}"] if less < least[0] else []
        missed += [f"time against {name}"] if faster < least[1] else []
    return missed


def main() -> int:
    """Read the options, run, report; the exit code is 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--peers", metavar="PYTHON", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32000, 50257])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--steps", type=int, default=3, help="steps of a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each form")
    parser.add_argument("--one", choices=list(FORMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        found = measure(options.one, options.kinds[0], options.vocabularies[0], options.steps)
        print(json.dumps(asdict(found)))
        return 0
    print(f"torch {torch.__version__}; 1,024 tokens, 768 count; float32, one thread; medians")
    missed = []
    for vocabulary in options.vocabularies:
        for kind in options.kinds:
            rounds: dict[str, list[Measured]] = {}
            for turn in range(options.rounds):
                names = [name for name in FORMS if turn == 0 or name in rounds]
                for name in names[turn:] + names[:turn]:
                    python = options.peers if name in PEERS else sys.executable
                    one = in_a_process(python, name, kind, vocabulary, options.steps)
                    if one is not None:
                        rounds.setdefault(name, []).append(one)
            worst = check_same({name: ones[0] for name, ones in rounds.items()})
            print(
                f"\n{kind}, V = {vocabulary:,}; largest difference of loss and gradient norms {worst:.0e}", flush=True
            )
            missed += [f"{kind}, V = {vocabulary}: {what}" for what in report(rounds)]
    print("\n" + ("goals missed: " + "; ".join(missed) if missed else "all goals met"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
