"""The one training loop.

A step sums losses and unit counts over its micro-batches and divides the gradient once, so any
split of the same rows into micro-batches gives the same update. The position in the data is a
function of the step, so resuming needs no sampler state; checkpoints are written between steps,
so there are no half-summed gradients to keep.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdtool.data.batching import epoch_batches
from kdtool.data.examples import Examples
from kdtool.errors import Interrupted, TrainingProblem
from kdtool.run import Run
from kdtool.sections import TrainSection
from kdtool.tasks._base import ROWS, VIEW, Batch, to_device
from kdtool.tasks._views import Views, collated
from kdtool.train import checkpoint, parallel, state
from kdtool.train.optim import parameter_groups
from kdtool.train.schedule import factor

Found = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors and state of a checkpoint."""

_UNITS = "units of "
"""What the key of a part's own number of units starts with."""

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class History:
    """What happened.

    Attributes:
        rows: One mapping per logged step: step, loss, lr, and the method's named terms, per unit.
        steps: Optimiser steps done.
        seconds: Wall time of training, over all sessions of a resumed run.
        samples: Examples seen.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    samples: int = 0


class Plan:
    """Which rows belong to which step: a pure function of data, configuration and seed."""

    def __init__(self, data: Examples, config: TrainSection, seed: int, world: int = 1) -> None:
        self.data = data
        self.config = config
        self.seed = seed
        self.world = world
        self.size = config.batch_size * world
        self.per_epoch = math.ceil(len(data) / self.size)
        whole = max(1, math.ceil(config.epochs * self.per_epoch / config.grad_accum))
        self.steps = config.max_steps or whole
        self._epoch = -1
        self._batches: list[Any] = []

    def epoch(self, step: int, micro: int) -> int:
        """The pass over the data, from 0, that a micro-batch belongs to."""
        return (step * self.config.grad_accum + micro) // self.per_epoch

    def rows(self, step: int, micro: int) -> Any:
        """Row numbers of micro-batch `micro` of step `step`, over all processes."""
        epoch, position = divmod(step * self.config.grad_accum + micro, self.per_epoch)
        if epoch != self._epoch:
            self._batches = epoch_batches(
                self.data.lengths,
                len(self.data),
                self.size,
                seed=self.seed,
                epoch=epoch,
                buckets=self.config.buckets,
            )
            self._epoch = epoch
        return self._batches[position]


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a request; a second Ctrl-C interrupts at once."""
    asked: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    previous: dict[int, Any] = {}
    # signal handlers can only be set in the main thread; elsewhere the caller stops us otherwise
    with contextlib.suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle)
    try:
        yield lambda: bool(asked)
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)


def _kept_frozen(method: torch.nn.Module) -> set[str]:
    """Names of the parameters that no stage may free."""
    return {name for name, p in method.named_parameters() if getattr(p, "kept_frozen", False)}


def _means(sums: dict[str, float], count: float) -> dict[str, float]:
    """Sums divided by their units; those without any are left out."""
    found = {}
    for name, total in sums.items():
        units = sums.get(f"{_UNITS}{name}", count or 1.0)
        if not name.startswith(_UNITS) and units:
            found[name] = total / units
    return found


class Trainer:
    """Trains one method on encoded data.

    Args:
        method: A `kdtool.methods._base.Method`.
        data: Encoded training rows.
        config: Optimisation settings; `lr` must be set.
        run: Context.
        is_head: Names the parameters that train at `head_lr`.
        folder: Where checkpoints go; None for none.
        views: Makes altered rows; None to train on the rows as they are.
    """

    def __init__(
        self,
        method: Any,
        data: Examples,
        config: TrainSection,
        run: Run,
        is_head: Callable[[str], bool] = lambda _name: False,
        folder: Path | None = None,
        views: Views | None = None,
    ) -> None:
        assert config.lr is not None
        for teacher in method.teacher_list:
            teacher.model.to(run.device)
        # by name, since sharding makes new parameters, without the mark
        self.frozen = _kept_frozen(method)
        self.method = method.to(run.device)
        if run.world > 1 and config.parallel == "fsdp2":
            parallel.shard(method.student, run)
        self.plan = Plan(data, config, run.seed, run.world)
        self.config = config
        # losses that carry T^2 would be cut to the size of others under SGD, whose steps have no scale of their own
        self.clip = config.clip if config.clip is not None else float(config.optimizer == "adamw")
        self.run = run
        self.folder = folder
        self.views = views
        method.setup(self.load(range(min(2, len(data)))), data)
        self.frozen |= _kept_frozen(method)
        self.method.to(run.device)
        self.is_head = is_head
        self.history = History()
        self.every = config.checkpoint_every or max(1, math.ceil(self.plan.steps / 10))
        self.scaler = torch.amp.GradScaler(enabled=run.dtype == "float16" and run.device.startswith("cuda"))
        self._pending: dict[str, Tensor] = {}
        self._pending_count: Tensor | float = 0.0
        if run.rank == 0:
            for message in method.cautions(self.plan.steps * config.grad_accum / self.plan.per_epoch):
                run.reporter.warn(message)

    def train(self) -> History:
        """Run all stages to the end, or resume them.

        Raises:
            Interrupted: the user asked to stop; a checkpoint was written.
            TrainingProblem: the loss is not finite.
        """
        if self.run.rank:
            state.seed_everything(self.run.seed + self.run.rank)  # dropout must differ between processes
        found = self._found()
        self.method.steps = self.plan.steps
        start = int(found[1]["step"]) if found else 0
        stages = list(self.method.stages())
        ends = self._ends([stage.share for stage in stages])
        began = time.perf_counter() - self.history.seconds
        lost = parallel.peers() if self.run.world > 1 else contextlib.nullcontext()
        with _stop_signals() as stop, lost:
            for stage, first, last in zip(stages, [0, *ends[:-1]], ends, strict=True):
                if start >= last:
                    continue
                self.method.enter(stage.name, resumed=start > first)
                optimizer = self._enter(stage.trains)
                if found and start > first:
                    state.restore_optimizer(optimizer, found[0])
                if found:
                    self._restore_own(found)
                    found = None
                for step in range(max(first, start), last):
                    self._step(optimizer, step, first, last)
                    self._after(stage.name, optimizer, step + 1, began, stop)
        self.method.eval()
        return self.history

    def _found(self) -> Found | None:
        """The checkpoint to go on from, with the method and the history put back to it.

        Raises:
            TrainingProblem: the processes do not see the same checkpoints.
        """
        if self.folder is None or not self.config.resume:
            return None
        silent = self.run.rank != 0
        found = checkpoint.newest(self.folder, (lambda _: None) if silent else self.run.reporter.warn)
        start = int(found[1]["step"]) if found else 0
        if len(set(parallel.gather_objects(self.run, start))) > 1:
            raise TrainingProblem(
                "the processes of this job see different checkpoints",
                hint="the output folder must be on storage that all hosts share",
            )
        if self.run.rank == 0:
            checkpoint.discard(self.folder, start)
        if found is None:
            return None
        for name, value in self.method.state_dict().items():
            parallel.fill(value, found[0][f"method.{name}"])
        self.history = History(**found[1]["history"])
        self.scaler.load_state_dict(found[1]["scaler"])
        if found[1]["world"] != self.plan.world:
            # steps keep their rows, so that the learning rate and the number of steps still mean the same
            self.plan = Plan(self.plan.data, self.config, self.run.seed, found[1]["world"])
            self.every = self.config.checkpoint_every or max(1, math.ceil(self.plan.steps / 10))
        self.run.reporter.info(f"resuming after step {start} of {self.plan.steps}")
        return found

    def _restore_own(self, found: Found) -> None:
        """Put back what each process has of its own; another number of processes starts it anew."""
        saved, sums = found[1]["generators"], found[1]["pending"]
        if len(saved) == self.run.world:
            prefix = f"rank{self.run.rank}."
            own = {name.removeprefix(prefix): t for name, t in found[0].items() if name.startswith(prefix)}
            state.restore_generators(own, saved[self.run.rank])
            sums = sums[self.run.rank]
        else:
            self.run.reporter.warn(
                f"the checkpoint is of {len(saved)} processes, this run has {self.run.world}: "
                f"steps keep their {self.plan.size} rows, random generators start anew"
            )
            share = 1.0 if self.run.rank == 0 else 0.0
            sums = {name: share * math.fsum(one[name] for one in sums) for name in sums[0]}
        self._pending_count = sums.pop("count")
        self._pending = {name: torch.tensor(value, device=self.run.device) for name, value in sums.items()}

    def _ends(self, shares: Sequence[float]) -> list[int]:
        """Last step of each stage; shares are taken relative to their sum."""
        done, ends = 0.0, []
        for share in shares:
            done += share
            ends.append(round(done / sum(shares) * self.plan.steps))
        return ends

    def _enter(self, trains: Callable[[str], bool]) -> torch.optim.Optimizer:
        """Freeze and free parameters for a stage and build its optimiser."""
        named = [(name, p) for name, p in self.method.named_parameters() if name not in self.frozen]
        for name, parameter in named:
            parameter.requires_grad_(trains(name))
        lr = float(self.config.lr or 0)
        groups = parameter_groups(
            [(name, p) for name, p in named if p.requires_grad],
            lr,
            self.config.head_lr or lr,
            self.config.weight_decay,
            self.is_head,
        )
        if not groups:
            raise TrainingProblem("nothing to train", why="all parameters are frozen", hint="see student.freeze")
        self.parameters = [p for _, p in named if p.requires_grad]
        self.method.train()
        built: torch.optim.Optimizer = self.method.optimizer(groups, self.config, self.run.device)
        return built

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        dtype = _AUTOCAST.get(self.run.dtype or "")
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.run.device.split(":")[0], dtype)

    def load(self, rows: Any, epoch: int = 0) -> Batch:
        """Collated rows on the device, altered as they are in that epoch."""
        if self.views is None:
            numbers, batch = rows, collated(self.method.task, self.plan.data, rows, self.run.device)
        else:
            numbers = self.views.numbers(rows, epoch)
            batch = self.views.batch(numbers, self.run.device)
        if self.method.caches or self.method.needs_rows:
            named = {ROWS: rows, VIEW: numbers}.items()
            batch |= to_device({key: torch.as_tensor(np.asarray(value)) for key, value in named}, self.run.device)
        return batch

    def _step(self, optimizer: torch.optim.Optimizer, step: int, first: int, last: int) -> None:
        """One optimiser step over all its micro-batches."""
        self.method.before_step(step)
        scale = factor(step - first, last - first, self.config.warmup, self.config.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        progress = step / self.plan.steps
        count: Tensor | float = 0.0
        for micro in range(self.config.grad_accum):
            everyone = self.plan.rows(step, micro)
            self.history.samples += len(everyone)
            for rows, idle in self._shares(everyone):
                batch = self.load(rows, self.plan.epoch(step, micro))
                with self._autocast():
                    losses = self.method(batch, progress)
                self.scaler.scale(losses.total * 0 if idle else losses.total).backward()
                count = count + (0 if idle else losses.count)
                noted = {"loss": losses.total, **losses.parts}
                noted |= {f"{_UNITS}{name}": value for name, value in losses.units.items()}
                for name, value in noted.items():
                    self._note(name, torch.zeros_like(value) if idle else value.detach())
        self._pending_count = self._pending_count + count
        if self.run.world > 1:
            parallel.sum_gradients(self.run, self.parameters)
            count = parallel.sum_over(self.run, torch.as_tensor(count, dtype=torch.float64, device=self.run.device))
        self.scaler.unscale_(optimizer)
        self._divide_and_clip(count)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def _shares(self, everyone: Any) -> Iterator[tuple[Any, bool]]:
        """This process's rows of a micro-batch, `batch_size` at a time, and whether they do not count.

        A process without rows still runs one, since sharded models need all processes in a forward pass.
        There is more than one turn only after a resume with fewer processes.
        """
        own = everyone[self.run.rank :: self.run.world]
        turns = math.ceil(len(everyone) / (self.config.batch_size * self.run.world))
        if self.method.batchwise or turns <= 1:
            yield (own, False) if len(own) else (everyone[:1], True)
            return
        for turn in range(turns):
            part = own[turn * self.config.batch_size : (turn + 1) * self.config.batch_size]
            yield (part, False) if len(part) else (everyone[:1], True)

    def _note(self, name: str, value: Tensor) -> None:
        self._pending[name] = self._pending[name] + value if name in self._pending else value

    def _divide_and_clip(self, count: Tensor | float) -> None:
        """Turn summed gradients into means and bound their norm, in one pass over the gradients."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        divisor = torch.as_tensor(count, dtype=torch.float32, device=self.run.device).clamp_min(1)
        scale = 1.0 / divisor
        if self.clip:
            norm = parallel.total_norm(grads) * scale
            scale = scale * (self.clip / (norm + 1e-6)).clamp_max(1.0)
        for kind in parallel.by_kind(grads):
            torch._foreach_mul_(kind, scale)

    def _after(
        self, stage: str, optimizer: torch.optim.Optimizer, done: int, began: float, stop: Callable[[], bool]
    ) -> None:
        """Log, checkpoint and stop where it is time to."""
        self.history.steps = done
        ended = done == self.plan.steps
        if done % self.config.log_every == 0 or ended or done == 1:
            self._log(stage, optimizer, done)
        asked = stop()
        if self.run.world > 1:
            # all processes must stop after the same step
            asked = bool(parallel.sum_over(self.run, torch.tensor(float(asked), device=self.run.device)))
        stopping = asked and not ended
        if self.folder and not ended and (stopping or done % self.every == 0):
            self.history.seconds = time.perf_counter() - began
            self._save(stage, optimizer, done)
        self.history.seconds = time.perf_counter() - began
        if stopping:
            raise Interrupted(
                f"stopped after step {done} of {self.plan.steps}",
                why="a checkpoint was written" if self.folder else None,
                hint="the same command goes on from there" if self.folder else None,
            )

    def _log(self, stage: str, optimizer: torch.optim.Optimizer, done: int) -> None:
        sums = torch.tensor([float(self._pending_count), *map(float, self._pending.values())], dtype=torch.float64)
        count, *totals = parallel.sum_over(self.run, sums.to(self.run.device)).tolist()
        means = _means(dict(zip(self._pending, totals, strict=True)), count)
        self._pending, self._pending_count = dict.fromkeys(self._pending, torch.zeros(())), 0.0
        if not math.isfinite(means["loss"]):
            raise TrainingProblem(
                f"the loss is {means['loss']} at step {done}",
                hint="lower --lr, or --dtype float32; check the data for broken rows",
            )
        lr = max(float(group["lr"]) for group in optimizer.param_groups)
        self.history.rows.append({"step": done, "lr": lr, **means})
        self.run.reporter.progress(stage, done, self.plan.steps, {"loss": means["loss"]})

    def _save(self, stage: str, optimizer: torch.optim.Optimizer, done: int) -> None:
        assert self.folder is not None
        tensors = {f"method.{name}": parallel.whole(value) for name, value in self.method.state_dict().items()}
        tensors |= {name: parallel.whole(value) for name, value in state.optimizer_tensors(optimizer).items()}
        pending = {"count": float(self._pending_count)} | {name: float(v) for name, v in self._pending.items()}
        own = parallel.gather_objects(self.run, (*state.generators(), pending))
        for rank, (generator_tensors, _, _) in enumerate(own):
            tensors |= {f"rank{rank}.{name}": value for name, value in generator_tensors.items()}
        history = {name: getattr(self.history, name) for name in ("rows", "steps", "seconds", "samples")}
        if self.run.rank == 0:
            record = {"step": done, "stage": stage, "world": self.plan.world, "history": history}
            record |= {"generators": [entry for _, entry, _ in own], "pending": [entry for _, _, entry in own]}
            record["scaler"] = self.scaler.state_dict()
            checkpoint.save(self.folder, done, tensors, record)
        parallel.wait(self.run)
