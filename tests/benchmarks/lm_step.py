"""Processor time of a training step of language models, kdtool's against TRL's trainers on the same pair and rows.

Supervised steps (generalised JSD on the data's targets) against `GKDTrainer` with lmbda 0, steps on the student's own
texts against `GKDTrainer` with lmbda 1 and `DistillationTrainer`. All take turns in one process, one thread; before
anything is timed, the supervised losses must agree. TRL is no dependency: have it in a folder of its own.

    pip install --no-deps --target build/peers trl==1.16.0
    OMP_NUM_THREADS=1 PYTHONPATH=build/peers python -m tests.benchmarks.lm_step
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from kdtool.models import Loaded
from kdtool.registry import METHODS
from kdtool.run import Run
from kdtool.tasks._base import Batch
from kdtool.train.loop import Trainer
from kdtool.train.state import seed_everything
from tests.benchmarks.step_overhead import prepare

BETA, LR = 0.5, 1e-4


def copied(loaded: Loaded) -> Loaded:
    """A model of its own with the same weights."""
    return Loaded(copy.deepcopy(loaded.model), loaded.processor, loaded.ref, None, None, dict(loaded.facts))


class Ours:
    """kdtool's trainer, stepped by hand."""

    def __init__(self, name: str, values: dict[str, Any], parts: tuple, config: Any) -> None:
        task, teacher, student, rows = parts
        seed_everything(0)
        settings = METHODS.build_config(name, values)
        self.method = METHODS.get(name)(settings, copied(student), [copied(teacher)], task)
        self.trainer = Trainer(self.method, rows, config, Run())
        self.optimizer = self.trainer._enter(lambda _name: True)

    def loss(self, batch: Batch) -> float:
        """Of a batch, without dropout."""
        self.method.eval()
        found = self.method(batch, 0.0)
        self.method.train()
        return float(found.total.detach()) / int(found.count)

    def step(self, number: int) -> None:
        """Rows, forward, backward, clipping and update."""
        self.trainer._step(self.optimizer, number, 0, self.trainer.plan.steps)


class Theirs:
    """A trainer of TRL, stepped by hand: what `Trainer.train` does in a step, without its callbacks and logs."""

    def __init__(self, trainer: Any, feed: Callable[[int], Any]) -> None:
        self.trainer, self.feed = trainer, feed
        self.optimizer = trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1

    def step(self, number: int) -> None:
        """Forward, backward, clipping and update."""
        model = self.trainer.model
        model.train()
        self.trainer.training_step(model, self.feed(number), None)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.optimizer.step()
        model.zero_grad()


def peers(parts: tuple, batches: list[Batch], prompt: int) -> dict[str, Theirs]:
    """TRL's trainers on copies of the same models."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    _, teacher, student, _ = parts
    tokenizer = student.processor
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    width = int(batches[0]["input_ids"].shape[1])
    rows = len(batches[0]["input_ids"])
    shared = {"output_dir": tempfile.mkdtemp(), "report_to": [], "use_cpu": True, "learning_rate": LR, "bf16": False}
    shared |= {"per_device_train_batch_size": rows, "gradient_checkpointing": False, "beta": BETA, "max_grad_norm": 1.0}

    def pairs(number: int) -> Batch:
        ids = batches[number % len(batches)]["input_ids"]
        labels = ids.clone()
        labels[:, :prompt] = -100
        ones = torch.ones_like(ids)
        return {
            "input_ids": ids,
            "attention_mask": ones,
            "labels": labels,
            "prompts": ids[:, :prompt],
            "prompt_attention_mask": ones[:, :prompt],
        }

    def prompts(number: int) -> list[dict[str, str]]:
        ids = batches[number % len(batches)]["input_ids"]
        return [{"prompt": tokenizer.decode(row[:prompt], skip_special_tokens=True)} for row in ids]

    made = {}
    for name, lmbda in (("supervised", 0.0), ("own texts", 1.0)):
        config = GKDConfig(lmbda=lmbda, temperature=1.0, max_new_tokens=width - prompt, **shared)
        empty = Dataset.from_dict({"text": ["a"]})
        trainer = GKDTrainer(
            copied(student).model,
            copied(teacher).model,
            config,
            train_dataset=empty,
            processing_class=tokenizer,
            data_collator=lambda items: items,
        )
        made[f"TRL GKDTrainer, {name}"] = Theirs(trainer, pairs)
    config = DistillationConfig(temperature=1.0, max_completion_length=width - prompt, **shared)
    trainer = DistillationTrainer(
        copied(student).model,
        copied(teacher).model,
        config,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * rows}),
        processing_class=tokenizer,
    )
    made["TRL DistillationTrainer, own texts"] = Theirs(trainer, prompts)
    return made


def check(ours: Ours, trainer: Any, batch: Batch, inputs: Batch) -> None:
    """Both must have the same loss on the same rows.

    Raises:
        SystemExit: they have not, so times would say nothing.
    """
    trainer.model.eval()
    with torch.no_grad():
        theirs = float(trainer.compute_loss(trainer.model, inputs))
    own = ours.loss(batch)
    if abs(theirs - own) > 1e-4 * abs(own):
        raise SystemExit(f"losses differ: kdtool {own:.6f}, TRL {theirs:.6f}")


def measure(steppers: dict[str, Any], turns: int) -> dict[str, float]:
    """Least processor seconds of a step; the first turn warms up, and other work only ever adds to a time."""
    found: dict[str, list[float]] = {name: [] for name in steppers}
    for turn in range(turns + 1):
        for name, stepper in steppers.items():
            began = time.process_time()
            stepper.step(turn)
            if turn:
                found[name].append(time.process_time() - began)
    return {name: min(seconds) for name, seconds in found.items()}


def main() -> None:
    """Read the options, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--teacher", default="package:kdtool/quickstart/stories260k")
    parser.add_argument("--student", default="layers:3")
    parser.add_argument("--data", default="tinystories")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    parts, config = prepare(
        given.teacher, given.student, given.data, "causal-lm", 400, given.rows, given.turns + 1, given.window
    )
    values = {"divergence": "jsd", "beta": BETA}
    supervised = Ours("supervised-kd", values, parts, config)
    batches = [supervised.trainer.load(supervised.trainer.plan.rows(step, 0)) for step in range(given.turns + 1)]
    others = peers(parts, batches, given.window // 2)
    trl = others["TRL GKDTrainer, supervised"]
    check(supervised, trl.trainer, batches[0], trl.feed(0))
    steppers: dict[str, Any] = {
        "kdtool supervised-kd": supervised,
        "kdtool on-policy": Ours("on-policy", values, parts, config),
        "kdtool skd": Ours("skd", values, parts, config),
        **others,
    }
    found = measure(steppers, given.turns)
    print(f"{given.rows} windows of {given.window} tokens, half of each the prompt; torch {torch.__version__}")
    print("| step | processor time | steps a second, kdtool / it |\n| --- | ---: | ---: |")
    for name, seconds in found.items():
        own = found["kdtool supervised-kd" if "supervised" in name else "kdtool on-policy"]
        print(f"| {name} | {1000 * seconds:.0f} ms | {seconds / own:.2f} |")


if __name__ == "__main__":
    main()
