"""Processor time of a training step of every classifier method, as a ratio to a step of `kd`.

All methods take turns of one step on the same batch, in this one process, one thread: same teacher, student, rows and
optimiser. No teacher cache: every method that reads a teacher runs it.

    OMP_NUM_THREADS=1 python tests/benchmarks/step_overhead.py --teacher FOLDER --student layers:2 --data banking77
"""

import argparse
import copy
import statistics
import time

import numpy as np
import torch

from kdtool.config import load_config
from kdtool.errors import KdtoolError
from kdtool.models import Loaded
from kdtool.pipelines import setup
from kdtool.registry import METHODS, TASKS
from kdtool.run import Run
from kdtool.train.loop import Trainer
from kdtool.train.state import seed_everything


class Stepper:
    """One method's trainer, stepped by hand."""

    def __init__(self, name: str, parts: tuple, config: object) -> None:
        task, teacher, student, rows = parts
        seed_everything(0)
        own = Loaded(
            copy.deepcopy(student.model).train(), student.processor, "student", None, None, dict(student.facts)
        )
        facts = METHODS.info(name).facts
        most = facts.get("teachers", (1, 1))[1]
        others = [Loaded(copy.deepcopy(teacher.model), teacher.processor, "teacher")][:most]
        method = METHODS.get(name)(METHODS.build_config(name, {}), own, others, task)
        self.trainer = Trainer(method, rows, config, Run())
        self.optimizer = self.trainer._enter(lambda _name: True)
        self.seconds: list[float] = []

    def step(self, number: int) -> None:
        """One optimiser step, timed."""
        began = time.process_time()
        self.trainer._step(self.optimizer, number, 0, self.trainer.plan.steps)
        self.seconds.append(time.process_time() - began)


def prepare(
    teacher: str, student: str, data: str, task_name: str, rows: int, batch_size: int, steps: int, length: int = 64
) -> tuple:
    """Task, models and rows, and the settings of training."""
    options = {"teacher.model": teacher, "student.model": student, "data.source": data, "data.task": task_name}
    options |= {"data.limit": rows, "data.max_length": length, "runtime.device": "cpu", "data.label_map": "by-name"}
    options |= {"train.batch_size": batch_size, "train.max_steps": steps, "train.lr": 1e-4}
    config = load_config("distill", None, [], options)
    run, task = setup.make_run(config), TASKS.get(task_name)()
    splits = setup.get_data(config, task, run)
    # a teacher for other classes gets a new head of the right size: speed does not depend on its weights
    config.teacher.fine_tune = task_name == "text-classification"
    loaded = setup.load_teacher(config, task, splits, run)
    setup.relabel(splits, loaded, config, run)
    made = setup.load_student(config, task, splits, loaded, run)
    splits.test = splits.test.select(np.arange(8))
    encoded = setup.encode(task, splits, made, loaded, config, run)
    return (task, loaded, made, encoded.train), config.train


def measure(names: list[str], parts: tuple, config: object, turns: int) -> dict[str, float]:
    """Median processor seconds of a step; the first two warm up."""
    steppers = {}
    for name in names:
        try:
            steppers[name] = Stepper(name, parts, config)
        except KdtoolError as problem:
            print(f"{name}: {problem.message}")
    for turn in range(turns + 2):
        for stepper in steppers.values():
            stepper.step(turn)
    return {name: statistics.median(stepper.seconds[2:]) for name, stepper in steppers.items()}


def main() -> None:
    """Read the options, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", default="layers:2")
    parser.add_argument("--data", default="banking77")
    parser.add_argument("--task", default="text-classification")
    parser.add_argument("--methods", default="", help="names separated by commas (default: all that fit the task)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    fitting = [n for n in METHODS.names() if given.task in METHODS.info(n).facts["tasks"] and n != "combine"]
    names = [name for name in given.methods.split(",") if name] or fitting
    rows = (given.turns + 2) * given.batch_size
    parts, config = prepare(
        given.teacher, given.student, given.data, given.task, rows, given.batch_size, given.turns + 2
    )
    found = measure(list(dict.fromkeys(["kd", *names])), parts, config, given.turns)
    print("| method | step, ratio to kd |\n| --- | ---: |")
    for name, seconds in sorted(found.items(), key=lambda entry: entry[1]):
        print(f"| {name} | {seconds / found['kd']:.2f} |")


if __name__ == "__main__":
    main()
