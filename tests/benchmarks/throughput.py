"""Samples per second of kdtool's distillation loop, as ratios to other loops.

Everything runs in this one process, in rounds: kdtool's `Trainer` goes on for a few steps, then each
peer does, and so on, so that a machine that is busy for a while slows all of them. All is one thread,
so goals are judged by processor time; the ratios by wall time stand beside. The trainer is the one
users get; the peers' turns come in its reporter's `progress`. Peers get the same models, rows, batch
size, loss and learning rate; tokenisation is done before, for all.

    OMP_NUM_THREADS=1 python tests/benchmarks/throughput.py --teacher FOLDER --data trec-or-banking77
"""

import argparse
import copy
import importlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import optimizer as optimizers
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from transformers import DataCollatorWithPadding

from kdtool.config import load_config
from kdtool.data.examples import Examples
from kdtool.derive import from_layers
from kdtool.models import Loaded, load_model
from kdtool.pipelines import setup
from kdtool.registry import METHODS, TASKS
from kdtool.run import Run, Silent
from kdtool.train.loop import Trainer
from kdtool.train.state import seed_everything

TEMPERATURE, CE_WEIGHT, KD_WEIGHT, LR, CLIP = 4.0, 0.1, 0.9, 1e-4, 1.0
_VISION = torch.library.Library("torchvision", "FRAGMENT")  # kept: its end would undo what it declares
_LOGITS = {"path": "classifier", "io": "output"}
PADDED, SHUFFLED, BUCKETED = "plain, padded", "torchdistill, shuffled", "torchdistill, kdtool's batches"


@dataclass(slots=True)
class Clock:
    """Samples, and seconds by the wall and by the processor, of one loop, round by round."""

    rounds: list[tuple[int, float, float]] = field(default_factory=list)

    def add(self, samples: int, began: tuple[float, float]) -> None:
        self.rounds.append((samples, *(now - then for now, then in zip(times(), began, strict=True))))

    def rates(self) -> np.ndarray:
        """Samples per second: [rounds + 1, 2], wall and processor time, the last row over all rounds."""
        table = np.array([*self.rounds, np.sum(self.rounds, axis=0)])
        return table[:, :1] / table[:, 1:]


def times() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


@dataclass(slots=True)
class Setting:
    """What all loops share: models, encoded rows, batch size, and the batches kdtool will take."""

    task: Any
    teacher: Loaded
    student: Loaded
    rows: Examples
    batch_size: int
    pad_to: int
    batches: list[list[int]] = field(default_factory=list)

    def new_student(self) -> nn.Module:
        return copy.deepcopy(self.student.model).train()


# --- the peers: each yields the number of samples after every optimiser step -----------------------------


def soft_and_hard(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The loss as tutorials write it."""
    soft = functional.kl_div(
        functional.log_softmax(student / TEMPERATURE, -1),
        functional.softmax(teacher / TEMPERATURE, -1),
        reduction="batchmean",
    )
    return KD_WEIGHT * TEMPERATURE**2 * soft + CE_WEIGHT * functional.cross_entropy(student, labels)


def padded_tensors(setting: Setting) -> TensorDataset:
    """All rows padded to one length before training: ids, mask, labels."""
    ids = np.full((len(setting.rows), setting.pad_to), setting.task.padding[""], dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(setting.rows.columns["input_ids"]):
        ids[i, : len(row)], mask[i, : len(row)] = row[: setting.pad_to], 1
    return TensorDataset(*map(torch.from_numpy, (ids, mask, np.asarray(setting.rows.columns["labels"]))))


def plain(setting: Setting) -> Iterator[int]:
    """A tutorial's loop: fixed padding, DataLoader, AdamW as it comes; no clipping, schedule or log."""
    student, teacher = setting.new_student(), setting.teacher.model
    loader = DataLoader(padded_tensors(setting), batch_size=setting.batch_size, shuffle=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR)
    while True:
        for ids, mask, labels in loader:
            with torch.no_grad():
                target = teacher(input_ids=ids, attention_mask=mask).logits
            loss = soft_and_hard(student(input_ids=ids, attention_mask=mask).logits, target, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield len(labels)


def import_torchdistill() -> bool:
    """Import torchdistill, before anything that loads models; False where it is not installed.

    It imports torchvision even for text. A torchvision built for another torch cannot load its compiled
    operators and then fails for want of two names; declaring these (nothing here calls them) lets its
    Python part load.
    """
    try:
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
            for name in ("nms", "qnms"):
                _VISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            importlib.import_module("torchvision")
        importlib.import_module("torchdistill.core.distillation")
    except ImportError as error:
        print(f"torchdistill is left out: {error}; see the README beside this file")
        return False
    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    return True


def distillation_box(setting: Setting, batches: list[list[int]] | None) -> Any:
    """torchdistill's DistillationBox, configured as its text examples are: hooks, KDLoss, clipping.

    Args:
        setting: Models and rows.
        batches: Fixed batches in order, or None for shuffled ones; both padded to their longest row.
    """
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.datasets import registry

    collator = DataCollatorWithPadding(setting.teacher.processor)

    def pad_batch(items: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
        padded = collator([{"input_ids": item["input_ids"]} for item in items])
        return dict(padded), torch.tensor([int(item["labels"]) for item in items]), {}

    registry.register_collate_func(pad_batch, key="pad_batch")
    registry.register_batch_sampler(lambda sampler, chosen: chosen, key="fixed_batches")
    loader: dict[str, Any] = {
        "dataset_id": "train",
        "requires_supp": False,
        "sampler": {"class_or_func": RandomSampler},
        "collate_fn": "pad_batch",
        "kwargs": {} if batches else {"batch_size": setting.batch_size},
    }
    if batches:
        loader["batch_sampler"] = {"key": "fixed_batches", "kwargs": {"chosen": batches}}
    side = {"forward_proc": "forward_batch_only_as_kwargs", "forward_hook": {"output": ["classifier"]}}
    place = {f"{who}_module_{what}": value for who in ("student", "teacher") for what, value in _LOGITS.items()}
    kd = {"key": "KDLoss", "kwargs": {**place, "temperature": TEMPERATURE, "alpha": CE_WEIGHT, "beta": KD_WEIGHT}}
    config = {
        "num_epochs": 1,
        "train_data_loader": loader,
        "teacher": {**side, "requires_grad": False},
        "student": side,
        "optimizer": {"key": "AdamW", "kwargs": {"lr": LR}, "max_grad_norm": CLIP},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}}},
    }
    # the box hooks and freezes what it is given, so it gets a teacher of its own
    teacher = copy.deepcopy(setting.teacher.model).eval()
    data = {"train": setting.rows}
    return get_distillation_box(
        teacher,
        setting.new_student(),
        data,
        config,
        torch.device("cpu"),
        device_ids=None,
        distributed=False,
        lr_factor=1,
    )


def torchdistill(setting: Setting, batches: list[list[int]] | None) -> Iterator[int]:
    """torchdistill's loop around its box, without the logging of its examples."""
    box = distillation_box(setting, batches)
    while True:
        box.pre_epoch_process(epoch=0)
        for sample_batch, targets, supp in box.train_data_loader:
            loss = box.forward_process(sample_batch, targets=targets, supp_dict=supp)
            box.post_forward_process(loss)
            yield len(targets)
        box.post_epoch_process()


# --- kdtool, and where its time goes ---------------------------------------------------------------------


class Parts:
    """Seconds in the work no loop can do without, counted while `active`."""

    names = ("teacher forward", "student forward", "backward", "optimizer")

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(self.names, 0.0)
        self.active = False
        self._began = 0.0

    def begin(self, *_args: Any, **_kwargs: Any) -> None:
        self._began = time.process_time()

    def end(self, name: str) -> Callable[..., None]:
        def note(*_args: Any, **_kwargs: Any) -> None:
            if self.active:
                self.seconds[name] += time.process_time() - self._began

        return note

    @contextmanager
    def watch(self, teacher: nn.Module, student: nn.Module) -> Iterator[None]:
        """Hook both models, every optimiser's step and backward passes."""
        backward = Tensor.backward

        def timed(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
            self.begin()
            backward(tensor, *args, **kwargs)
            self.end("backward")()

        with ExitStack() as stack:
            for name, model in (("teacher forward", teacher), ("student forward", student)):
                stack.enter_context(model.register_forward_pre_hook(self.begin))
                stack.enter_context(model.register_forward_hook(self.end(name)))
            stack.enter_context(optimizers.register_optimizer_step_pre_hook(self.begin))
            stack.enter_context(optimizers.register_optimizer_step_post_hook(self.end("optimizer")))
            stack.enter_context(mock.patch.object(Tensor, "backward", timed))
            yield


class Turns(Silent):
    """A reporter in whose `progress` the peers take their turns."""

    def __init__(self, peers: Mapping[str, tuple[Iterator[int], int]], parts: Parts, batch_size: int) -> None:
        self.peers = peers
        self.parts = parts
        self.batch_size = batch_size
        self.clocks = {name: Clock() for name in ("kdtool", *peers)}
        self._done = 0
        self._began = times()

    def progress(self, stage: str, done: int, total: int, facts: Mapping[str, float | str]) -> None:
        """End kdtool's turn, let the peers have theirs; the first, of one step each, warms up."""
        warm, self.parts.active = self._done > 0, False
        if warm:
            self.clocks["kdtool"].add((done - self._done) * self.batch_size, self._began)
        names = list(self.peers)
        turn = len(self.clocks["kdtool"].rounds) % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            steps, share = self.peers[name]
            began = times()
            samples = sum(next(steps) for _ in range(max(1, (done - self._done) // share)))
            if warm:
                self.clocks[name].add(samples, began)
        self._done, self.parts.active, self._began = done, True, times()


def prepare(teacher: str, data: str, layers: str, batch_size: int, batches: int, pad_to: int) -> Setting:
    """Load the models and as many random training rows as the run needs."""
    options = {"teacher.model": teacher, "data.source": data, "method.name": "kd", "runtime.device": "cpu"}
    config = load_config("distill", None, [], options)
    run, task = setup.make_run(config), TASKS.get("text-classification")()
    splits = setup.get_data(config, task, run)
    # a teacher for other classes gets a new head of the right size: speed does not depend on its weights
    loaded = load_model(teacher, task.auto_class, run, "teacher", splits.labels)
    setup.load_processor(loaded, task, run)
    loaded.model.requires_grad_(False)
    rows = splits.train.select(np.random.default_rng(0).permutation(len(splits.train))[: batches * batch_size])
    encoded = task.encode(rows, loaded, config, run)
    return Setting(task, loaded, from_layers(loaded, f"layers:{layers}"), encoded, batch_size, pad_to)


def make_trainer(setting: Setting, reporter: Any, rounds: int) -> Trainer:
    """kdtool's loop over all rows once; fills in `setting.batches`."""
    steps = len(setting.rows) // setting.batch_size
    student = Loaded(setting.new_student(), setting.student.processor, "student")
    values = {"temperature": TEMPERATURE, "ce_weight": CE_WEIGHT, "kd_weight": KD_WEIGHT}
    method = METHODS.get("kd")(METHODS.build_config("kd", values), student, [setting.teacher], setting.task)
    options = {"train.lr": LR, "train.clip": CLIP, "train.max_steps": steps, "train.batch_size": setting.batch_size}
    config = load_config("distill", None, [], {**options, "train.log_every": steps // rounds, "method.name": "kd"})
    trainer = Trainer(method, setting.rows, config.train, Run(reporter=reporter))
    setting.batches = [[int(i) for i in trainer.plan.rows(step, 0)] for step in range(steps)]
    return trainer


@torch.no_grad()
def check_same_work(setting: Setting, trainer: Trainer, box: Any | None) -> None:
    """All loops compute the same loss on the same rows, without dropout; else the ratios say nothing."""
    rows = setting.batches[0]
    trainer.method.eval()
    ours = float(trainer.method(trainer.load(rows), 0.0).total) / len(rows)
    ids, mask, labels = padded_tensors(setting)[rows]
    both = [m(input_ids=ids, attention_mask=mask).logits for m in (trainer.method.student, setting.teacher.model)]
    theirs = [float(soft_and_hard(*both, labels))]
    if box is not None:
        box.student_model.eval()
        batch, targets, supp = next(iter(box.train_data_loader))
        theirs.append(float(box.forward_process(batch, targets=targets, supp_dict=supp)))
    if not np.allclose(theirs, ours, rtol=1e-4, atol=1e-6):
        raise SystemExit(f"the loops do not do the same work: losses {ours} and {theirs}")


def measure(setting: Setting, rounds: int, with_torchdistill: bool) -> tuple[dict[str, Clock], dict[str, float]]:
    """Run all loops in turns.

    Returns:
        A clock for each loop, and kdtool's seconds by part.
    """
    seed_everything(0)
    parts, peers = Parts(), {}
    turns = Turns(peers, parts, setting.batch_size)
    trainer = make_trainer(setting, turns, rounds)
    peers[PADDED] = (plain(setting), 4)  # a step takes several times as long: a quarter of the steps will do
    box = None
    if with_torchdistill:
        peers[SHUFFLED] = (torchdistill(setting, None), 1)
        peers[BUCKETED] = (torchdistill(setting, setting.batches), 1)
        box = distillation_box(setting, setting.batches)
    turns.clocks |= {name: Clock() for name in peers}
    check_same_work(setting, trainer, box)
    with parts.watch(setting.teacher.model, trainer.method.student):
        trainer.train()
    total = sum(cpu for _, _, cpu in turns.clocks["kdtool"].rounds)
    return turns.clocks, parts.seconds | {"the rest": total - sum(parts.seconds.values())}


def report(clocks: Mapping[str, Clock], parts: Mapping[str, float], setting: Setting) -> bool:
    """Print the ratios and say whether the goals are met."""
    lengths, size = setting.rows.lengths, setting.batch_size
    assert lengths is not None
    padded = sum(max(lengths[rows]) * len(rows) for rows in setting.batches) / len(lengths)
    print(f"{len(lengths)} rows of {lengths.mean():.1f} tokens (longest {lengths.max()}), batches of {size},")
    print(f"{padded:.1f} tokens a row after padding by kdtool; one process, {torch.get_num_threads()} thread, float32")
    print("\nkdtool's samples per second, relative to          processor time (rounds)    wall time      goal")
    goals, met = {PADDED: 1.5, SHUFFLED: 1.0, BUCKETED: 1.0}, True
    ours = clocks["kdtool"].rates()
    for name in (name for name in goals if name in clocks):
        ratios = ours / clocks[name].rates()
        (wall, ratio), low, high = ratios[-1], ratios[:-1, 1].min(), ratios[:-1, 1].max()
        label = f"{name} to {setting.pad_to}" if name == PADDED else name
        print(f"  {label:<46} {ratio:6.2f} ({low:.2f} - {high:.2f}) {wall:12.2f}       >= {goals[name]}")
        met &= bool(ratio >= goals[name])
    total = sum(parts.values())
    print("\nwhere kdtool's step time goes")
    for name, seconds in parts.items():
        print(f"  {name:<48} {seconds / total:9.1%}" + ("                         < 5 %" if name == "the rest" else ""))
    met &= parts["the rest"] / total < 0.05
    print("\nall goals met" if met else "\nA GOAL IS MISSED")
    return met


def main() -> int:
    """Read the options, run, report; the exit code is 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--teacher", required=True, help="folder or id of a text classifier (BERT-like)")
    parser.add_argument("--data", default="banking77", help="sentences with classes: folder, file, id or shipped set")
    parser.add_argument("--layers", default="3", help="layers of the teacher that make the student")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=40, help="kdtool's steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pad-to", type=int, default=128, help="length that the plain loop pads to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with_torchdistill = import_torchdistill()
    setting = prepare(args.teacher, args.data, args.layers, args.batch_size, args.batches, args.pad_to)
    clocks, parts = measure(setting, args.rounds, with_torchdistill)
    teacher, data = (Path(name).name for name in (args.teacher, args.data))
    print(f"{teacher} -> layers:{args.layers} on {data}; torch {torch.__version__}")
    return 0 if report(clocks, parts, setting) else 1


if __name__ == "__main__":
    raise SystemExit(main())
