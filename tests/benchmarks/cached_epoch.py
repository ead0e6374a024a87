"""An epoch with a cached teacher, as a ratio to the same epoch without any teacher; goal: at most 1.05.

Two of kdtool's trainers, `kd` on a full teacher cache and `none`, take turns of a few steps in this one
process: same student, rows, batches and optimiser, one thread, so that a machine that is busy for a while
slows both. The same again with a `kd` that runs its teacher shows what the cache saves. Processor time counts.

    OMP_NUM_THREADS=1 python tests/benchmarks/cached_epoch.py --teacher FOLDER --data trec-or-banking77
"""

import argparse
import copy
import cProfile
import os
import pstats
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from kdtool.config import load_config
from kdtool.data.examples import Examples
from kdtool.derive import from_layers
from kdtool.models import Loaded, load_model
from kdtool.pipelines import setup
from kdtool.registry import METHODS, TASKS
from kdtool.run import Run, Silent
from kdtool.teacher_cache import TeacherCache, fingerprint
from kdtool.train.loop import Trainer
from kdtool.train.state import seed_everything

GOAL = 1.05
PAIRS = (("none", "kd, cached"), ("none", "kd, teacher run"))


class Turn(Silent):
    """A reporter that hands over to the next trainer after each of its progress reports."""

    def __init__(self, mine: threading.Semaphore, next_one: threading.Semaphore) -> None:
        self.mine, self.next_one = mine, next_one
        self.seconds: list[float] = []
        self.began = 0.0

    def start(self) -> None:
        self.mine.acquire()
        self.began = time.process_time()

    def progress(self, *_args: object) -> None:
        self.seconds.append(time.process_time() - self.began)
        self.next_one.release()
        self.start()


def prepare(teacher: str, data: str, layers: str, size: int) -> tuple[object, Loaded, Loaded, Examples]:
    """Task, teacher, student and `size` random training rows."""
    options = {"teacher.model": teacher, "data.source": data, "method.name": "kd", "runtime.device": "cpu"}
    config = load_config("distill", None, [], options)
    run, task = setup.make_run(config), TASKS.get("text-classification")()
    splits = setup.get_data(config, task, run)
    # a teacher for other classes gets a new head of the right size: speed does not depend on its weights
    loaded = load_model(teacher, task.auto_class, run, "teacher", splits.labels)
    setup.load_processor(loaded, task, run)
    rows = splits.train.select(np.random.default_rng(0).permutation(len(splits.train))[:size])
    return task, loaded, from_layers(loaded, f"layers:{layers}"), task.encode(rows, loaded, config, run)


def trainer(name: str, parts: tuple, folder: Path, batch_size: int, rounds: int, reporter: Silent) -> Trainer:
    """One of the three, with a student of its own."""
    task, teacher, student, rows = parts
    method = name.partition(",")[0]
    own = Loaded(copy.deepcopy(student.model).train(), student.processor, "student")
    teachers = [] if method == "none" else [teacher]
    built = METHODS.get(method)(METHODS.build_config(method, {}), own, teachers, task)
    steps = len(rows) // batch_size
    options = {"train.lr": 1e-4, "train.batch_size": batch_size, "train.max_steps": steps}
    options |= {"train.log_every": max(1, steps // rounds), "method.name": method}
    run = Run(reporter=reporter)
    made = Trainer(built, rows, load_config("distill", None, [], options).train, run)
    if name == "kd, cached":
        cache = TeacherCache(folder, task, teacher, rows, run, 0, fingerprint(teacher, rows, run, "same"), 2**32)
        cache.get(torch.arange(len(rows)))  # a full cache: the first epoch is over
        built.caches[0] = cache
    return made


def measure(names: tuple[str, ...], parts: tuple, folder: Path, batch_size: int, rounds: int) -> dict[str, np.ndarray]:
    """Processor seconds of each trainer, turn by turn; the first turn of one step warms up."""
    doors = [threading.Semaphore(0) for _ in names]
    turns = [Turn(doors[i], doors[(i + 1) % len(names)]) for i in range(len(names))]
    trainers = [trainer(name, parts, folder, batch_size, rounds, turn) for name, turn in zip(names, turns, strict=True)]

    def go(made: Trainer, turn: Turn) -> None:
        turn.start()
        seed_everything(0)
        made.train()
        turn.next_one.release()

    threads = [threading.Thread(target=go, args=pair) for pair in zip(trainers, turns, strict=True)]
    for thread in threads:
        thread.start()
    doors[0].release()
    for thread in threads:
        thread.join()
    return {name: np.array(turn.seconds[1:]) for name, turn in zip(names, turns, strict=True)}


def profile(parts: tuple, folder: Path, batch_size: int) -> None:
    """Print where a cached epoch spends its time outside of torch."""
    made = trainer("kd, cached", parts, folder, batch_size, 1, Silent())
    watch = cProfile.Profile()
    watch.runcall(made.train)
    pstats.Stats(watch).sort_stats("cumtime").print_stats("kdtool")


def main() -> int:
    """Read the options, run, report; the exit code is 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--teacher", required=True, help="folder or id of a text classifier (BERT-like)")
    parser.add_argument("--data", default="banking77", help="sentences with classes: folder, file, id or shipped set")
    parser.add_argument("--layers", default="3", help="layers of the teacher that make the student")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="show where a cached epoch spends its time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parts = prepare(args.teacher, args.data, args.layers, args.batch_size * args.batches)
    with tempfile.TemporaryDirectory() as scratch:
        if args.profile:
            profile(parts, Path(scratch), args.batch_size)
            return 0
        measured = [measure(pair, parts, Path(scratch), args.batch_size, args.rounds) for pair in PAIRS]
    print(f"{len(parts[3])} rows, batches of {args.batch_size}, layers:{args.layers}, torch {torch.__version__}")
    print("processor time relative to `none`    whole    rounds: median (5 % - 95 %)")
    for (base, values), (_, name) in zip((found.values() for found in measured), PAIRS, strict=True):
        low, middle, high = np.percentile(values / base, [5, 50, 95])
        print(f"  {name:<30} {values.sum() / base.sum():8.3f}    {middle:.3f} ({low:.3f} - {high:.3f})")
    base, values = measured[0].values()
    met = bool(np.median(values / base) <= GOAL)
    print(f"goal of {GOAL}: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
