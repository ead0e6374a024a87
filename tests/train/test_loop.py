"""The training loop against one written out in plain torch, and what it promises besides."""

import math
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from kdtool.data.examples import Examples
from kdtool.errors import Interrupted, TrainingProblem
from kdtool.methods._base import Losses, Method, Stage
from kdtool.models import Loaded
from kdtool.pipelines.setup import is_head_of
from kdtool.run import Run, Silent
from kdtool.sections import TrainSection
from kdtool.tasks._base import ROWS
from kdtool.train import checkpoint
from kdtool.train.loop import Plan, Trainer
from kdtool.train.schedule import factor
from kdtool.train.state import seed_everything


def settings(**changes):
    return TrainSection(**{"max_steps": 5, "batch_size": 4, "lr": 1e-2, "log_every": 1} | changes)


def rows_of(size, lengths=True):
    generator = np.random.default_rng(0)
    return Examples({"x": np.arange(size)}, generator.integers(1, 30, size) if lengths else None)


@pytest.mark.parametrize(
    ("size", "batch_size", "lengths"), [(37, 4, True), (40, 8, True), (5, 8, True), (23, 5, False)]
)
def test_a_plan_covers_each_row_once_in_every_epoch(size, batch_size, lengths):
    plan = Plan(rows_of(size, lengths), settings(batch_size=batch_size, max_steps=None, epochs=3.0), seed=1)
    assert plan.steps == 3 * math.ceil(size / batch_size)
    epochs = []
    for epoch in range(3):
        batches = [plan.rows(epoch * plan.per_epoch + i, 0) for i in range(plan.per_epoch)]
        assert sorted(np.concatenate(batches)) == list(range(size))
        assert max(map(len, batches)) <= batch_size
        epochs.append(np.concatenate(batches).tolist())
    assert epochs[0] != epochs[1] or plan.per_epoch == 1


def test_a_plan_is_a_pure_function_of_the_step():
    data = rows_of(30)
    straight = Plan(data, settings(grad_accum=3), seed=1)
    expected = {(step, micro): straight.rows(step, micro).tolist() for step in range(9) for micro in range(3)}
    jumping = Plan(data, settings(grad_accum=3), seed=1)
    for key in sorted(expected, key=lambda item: hash(item) % 7):
        assert jumping.rows(*key).tolist() == expected[key]
    other = Plan(data, settings(grad_accum=3), seed=2)
    assert [other.rows(i, 0).tolist() for i in range(9)] != [expected[i, 0] for i in range(9)]


@pytest.mark.parametrize(("epochs", "accum", "steps"), [(1.0, 1, 8), (0.5, 1, 4), (2.0, 3, 6), (0.01, 1, 1)])
def test_steps_of_epochs(epochs, accum, steps):
    assert Plan(rows_of(30), settings(max_steps=None, epochs=epochs, grad_accum=accum), 0).steps == steps


def by_hand(text, config):
    """The same training in plain torch: mean losses, torch's clipping, AdamW with four groups."""
    seed_everything(7)
    method = text.build("none")
    student = method.student.train()
    is_head = is_head_of(student)
    groups = [
        {
            "params": [
                p for n, p in student.named_parameters() if is_head(f"student.{n}") == head and (p.ndim > 1) == matrix
            ],
            "peak": config.head_lr if head else config.lr,
            "weight_decay": config.weight_decay if matrix else 0.0,
        }
        for head in (False, True)
        for matrix in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups)
    plan = Plan(text.train, config, 7)
    norms = []
    for step in range(config.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor(step, config.max_steps, config.warmup, config.schedule)
        batches = [text.batch(plan.rows(step, micro)) for micro in range(config.grad_accum)]
        size = sum(len(batch["labels"]) for batch in batches)
        for batch in batches:
            labels = batch.pop("labels")
            batch.pop(ROWS)
            (functional.cross_entropy(student(**batch).logits, labels, reduction="sum") / size).backward()
        norms.append(float(nn.utils.clip_grad_norm_(student.parameters(), config.clip or math.inf)))
        optimizer.step()
        optimizer.zero_grad()
    return student, norms


@pytest.mark.parametrize("clip", [0.5, 1e3, 0.0])
def test_equals_a_loop_in_plain_torch(text, clip):
    config = settings(grad_accum=2, clip=clip, head_lr=5e-2, weight_decay=0.1, warmup=0.4, schedule="cosine")
    expected, norms = by_hand(text, config)
    assert (max(norms) > clip) == (clip < 1), "the case does not show what it should"
    seed_everything(7)
    method = text.build("none")
    Trainer(method, text.train, config, Run(seed=7), is_head_of(method.student)).train()
    for (name, found), wanted in zip(method.student.named_parameters(), expected.parameters(), strict=True):
        # the gradient of a key's bias is rounding alone, and Adam makes steps of any gradient
        if not name.endswith("key.bias"):
            torch.testing.assert_close(
                found, wanted, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name} {text}"
            )


def test_history_holds_means_per_unit(text):
    method = text.build("kd")
    history = Trainer(method, text.train, settings(max_steps=25, log_every=10), Run()).train()
    assert [row["step"] for row in history.rows] == [1, 10, 20, 25]
    assert history.steps == 25
    assert history.samples == sum(len(Plan(text.train, settings(), 0).rows(step, 0)) for step in range(25))
    for row in history.rows:
        assert row["loss"] == pytest.approx(0.1 * row["ce"] + 0.9 * row["kd"], rel=1e-5)
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]


class Numbers:
    """A task of one number per row."""

    def collate(self, items):
        return {"x": torch.tensor([[float(item["x"])] for item in items])}


class Sum(Method):
    """Trains two lines towards zero; as small as a method gets."""

    def __init__(self, stages=None, spoil=None):
        super().__init__(None, Loaded(nn.Linear(1, 1), None, "sum"), [], Numbers())
        self.other = nn.Linear(1, 1)
        self.plan, self.spoil = stages or [Stage()], spoil
        self.seen = []

    def stages(self):
        return self.plan

    def step(self, batch, progress):
        self.seen.append(progress)
        out = (self.student(batch["x"]) + self.other(batch["x"])).square().sum()
        return Losses(out * math.nan if len(self.seen) == self.spoil else out, len(batch["x"]))


def stage(name, share, part):
    return Stage(name, share, lambda key: key.startswith(part))


def test_stages_train_their_own_parameters_in_turn():
    torch.manual_seed(0)
    changes = []

    class Watch(Silent):
        def progress(self, stage, done, total, facts):
            values = {key: value.clone() for key, value in method.state_dict().items()}
            changes.append((stage, {key for key, value in values.items() if not torch.equal(value, before[key])}))
            before.update(values)

    method = Sum([stage("first", 0.5, "student"), stage("second", 1.0, "other")])
    before = {key: value.clone() for key, value in method.state_dict().items()}
    Trainer(method, rows_of(8, False), settings(max_steps=6), Run(reporter=Watch())).train()
    student, other = {"student.weight", "student.bias"}, {"other.weight", "other.bias"}
    assert changes == [("first", student)] * 2 + [("second", other)] * 4
    assert method.seen == [step / 6 for step in range(6)]


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_stages_resume_one_by_one(tmp_path, at):
    def build():
        torch.manual_seed(0)
        return Sum([stage("first", 0.5, "student"), stage("second", 0.5, "other")])

    class Breaks(Silent):
        def progress(self, stage, done, total, facts):
            if done == at + 1:
                raise RuntimeError("cut off")

    config = settings(max_steps=6, checkpoint_every=1)
    whole = build()
    Trainer(whole, rows_of(8, False), config, Run()).train()
    with pytest.raises(RuntimeError, match="cut off"):
        Trainer(build(), rows_of(8, False), config, Run(reporter=Breaks()), folder=tmp_path).train()
    assert checkpoint.newest(tmp_path)[1]["step"] == at
    resumed = build()
    Trainer(resumed, rows_of(8, False), config, Run(), folder=tmp_path).train()
    assert len(resumed.seen) == 6 - at
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(TrainingProblem, match="the loss is nan at step 3") as caught:
        Trainer(Sum(spoil=3), rows_of(8, False), settings(), Run()).train()
    assert "--lr" in caught.value.hint


def test_all_frozen_is_refused():
    with pytest.raises(TrainingProblem, match="nothing to train"):
        Trainer(Sum([stage("none", 1.0, "nothing")]), rows_of(8, False), settings(), Run()).train()


def test_frozen_parameters_keep_their_values():
    method = Sum()
    method.other.weight.kept_frozen = True
    method.other.weight.requires_grad_(False)
    before = method.other.weight.clone()
    Trainer(method, rows_of(8, False), settings(), Run()).train()
    assert torch.equal(method.other.weight, before)
    assert method.other.weight.grad is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_stops(tmp_path, number):
    class Stops(Silent):
        def progress(self, stage, done, total, facts):
            if done == 2:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped after step 2 of 5") as caught:
        Trainer(Sum(), rows_of(8, False), settings(), Run(reporter=Stops()), folder=tmp_path).train()
    assert caught.value.exit_code == 130
    assert checkpoint.newest(tmp_path)[1]["step"] == 2
    assert signal.getsignal(number) is before


def test_resume_can_be_switched_off(tmp_path):
    config = settings(checkpoint_every=2)
    Trainer(Sum(), rows_of(8, False), config, Run(), folder=tmp_path).train()
    fresh = Sum()
    Trainer(fresh, rows_of(8, False), settings(resume=False), Run(), folder=tmp_path).train()
    assert len(fresh.seen) == 5


@pytest.mark.parametrize(("values", "bound"), [({}, 1.0), ({"optimizer": "sgd"}, 0.0), ({"clip": 0.5}, 0.5)])
def test_clipping_is_off_for_sgd_unless_asked_for(values, bound):
    """Losses with a factor T^2 would lose it."""
    assert Trainer(Sum(), rows_of(8, False), settings(**values), Run()).clip == bound
