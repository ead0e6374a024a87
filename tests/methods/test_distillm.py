"""DistiLLM: when student texts are used, the replay buffer, and both in a checkpoint."""

import pytest
import torch

from kdtool.divergences import divergence
from kdtool.run import Run, Silent
from kdtool.sections import TrainSection
from kdtool.tasks._base import ROWS
from kdtool.train.loop import Trainer
from kdtool.train.state import seed_everything
from tests.kits import make_kit


@pytest.fixture(scope="module")
def kit(models, data):
    return make_kit("causal-lm", models, data, "prompts")


class Breaks(Silent):
    def progress(self, stage, done, total, facts):
        if done == 5:
            raise RuntimeError("cut off")


def train(kit, folder=None, reporter=None, seed=7, **values):
    seed_everything(seed)
    method = kit.build("distillm", **values)
    config = TrainSection(max_steps=8, batch_size=4, lr=1e-2, log_every=1, checkpoint_every=2)
    return method, Trainer(method, kit.train, config, Run(seed=7, reporter=reporter or Silent()), folder=folder).train()


def test_share_and_buffer_are_part_of_a_checkpoint(kit, tmp_path):
    values = {"student_share": 0.8, "tolerance": 0.0, "checks": 8, "rise": 0.05, "capacity": 6}
    whole, history = train(kit, **values)
    assert int(whole.written) > 6, "the buffer was never full"
    assert len({row["student texts"] for row in history.rows}) == 2, "texts of one kind only"
    with pytest.raises(RuntimeError, match="cut off"):
        train(kit, tmp_path, Breaks(), **values)
    resumed, again = train(kit, tmp_path, seed=8, **values)
    assert again.rows == history.rows
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_share_rises_with_the_held_out_loss_alone(kit, monkeypatch):
    method = kit.build("distillm", checks=5)
    losses = iter([2.0, 1.5, 1.55, 1.7, 1.0])
    monkeypatch.setattr(method, "_held_out_loss", lambda: next(losses))
    method.train()
    found = []
    for step in range(10):
        method.step(kit.batch([0, 1]), step / 10)
        method.step(kit.batch([2, 3]), step / 10)
        found.append(round(float(method.phi), 3))
    # checks are due at steps 0, 2, 4, 6 and 8; only 1.55 -> 1.7 is a rise of more than 0.1
    assert found == [0.0] * 6 + [0.1] * 4


def test_held_out_rows_are_those_of_the_validation_split(kit):
    seed_everything(0)
    method = kit.build("distillm", watch_rows=5)
    assert "watches training rows" in method.cautions(1.0)[0]
    method.held_out = kit.test
    method.setup(kit.batch([0, 1]), kit.train)
    assert not method.cautions(1.0)
    rows = kit.task.collate([kit.test[i] for i in range(5)])
    out = kit.task.forward(method.student.eval(), rows)
    expected = torch.nn.functional.cross_entropy(out.logits, out.labels)
    assert method._held_out_loss() == pytest.approx(float(expected.detach()), rel=1e-5)
    assert method.student.training


def test_nothing_is_remembered_outside_training(kit):
    method = kit.build("distillm", student_share=1.0).eval()
    assert method.step(kit.batch([0, 1]), 0.0).parts["student texts"] > 0
    assert int(method.written) == 0
    assert int(method.checked) == 0
    method.train()
    method.step(kit.batch([0, 1]), 0.0)
    assert int(method.written) == 2


def test_recalled_texts_are_those_remembered(kit):
    method = kit.build("distillm", student_share=1.0, capacity=3).train()
    text = method.sampled(kit.batch([0, 1, 2, 3]), 0.25)
    method._remember(text, kit.batch([0, 1, 2, 3])[ROWS])
    known = {tuple(ids[: int(c.nonzero()[-1]) + 1].tolist()) for ids, c in zip(text.ids, text.counts, strict=True)}
    counted = {tuple(ids[c].tolist()) for ids, c in zip(text.ids, text.counts, strict=True)}
    found = method._recalled(kit.batch([5, 6, 7, 8, 9]), 0.25)
    for ids, counts in zip(found.ids, found.counts, strict=True):
        assert tuple(ids[: int(counts.nonzero()[-1]) + 1].tolist()) in known
        assert tuple(ids[counts].tolist()) in counted
    alone = method._recalled(kit.batch([7]), 0.25)
    assert torch.equal(alone.ids[0][alone.counts[0]], found.ids[2][found.counts[2]])


@pytest.mark.parametrize("kind", ["skewed-kl", "skewed-reverse-kl"])
def test_loss_is_the_skewed_divergence(kit, kind):
    method = kit.build("distillm", divergence=kind, skew=0.25).eval()
    batch = kit.batch([0, 1, 2])
    q, p = (kit.task.forward(m, batch).logits for m in (method.student, method.teacher_list[0].model))
    losses = method.step(batch, 0.0)
    torch.testing.assert_close(losses.total, divergence(q, p, method.which()), rtol=1e-4, atol=1e-4)
    q, p = (z.double().softmax(-1) for z in (q, p))
    first, second = (p, q) if kind == "skewed-kl" else (q, p)
    plain = (first * (first / (0.25 * first + 0.75 * second)).log()).sum()
    torch.testing.assert_close(losses.total.double(), plain, rtol=1e-4, atol=1e-4)
