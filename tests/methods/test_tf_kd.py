import pytest
import torch

from kdtool.divergences import forward_kl
from kdtool.methods.tf_kd import virtual_logits, virtual_loss
from kdtool.run import Run
from kdtool.train.loop import Trainer
from tests.contract.test_methods import Breaks, same_state, settings, train
from tests.kits import make_kit

LABELS = torch.tensor([2, 0])


@pytest.fixture(scope="module")
def kit(models, data):
    return make_kit("text-classification", models, data)


def test_the_virtual_teacher_is_right_and_even():
    p = virtual_logits(LABELS, 4, 0.94).softmax(-1)
    torch.testing.assert_close(p, torch.tensor([[0.02, 0.02, 0.94, 0.02], [0.94, 0.02, 0.02, 0.02]]))


def test_at_temperature_one_it_is_label_smoothing():
    logits = torch.tensor([[1.0, -1.0, 0.5], [0.3, 0.2, -2.0]], requires_grad=True)
    epsilon = 0.1
    smoothed = torch.nn.functional.cross_entropy(logits, LABELS, reduction="sum", label_smoothing=epsilon)
    found = virtual_loss(logits, LABELS, 1.0, 1 - epsilon + epsilon / 3)
    left, right = (torch.autograd.grad(loss, logits)[0] for loss in (smoothed, found))
    torch.testing.assert_close(left, right)
    exact = virtual_logits(LABELS, 3)
    assert virtual_loss(exact, LABELS, 20.0) == pytest.approx(0.0, abs=1e-5)


def test_the_first_life_teaches_the_second(kit):
    values = {"variant": "self", "first_share": 0.5, "temperature": 2.0}
    method = kit.build("tf-kd", **values)
    fresh = {name: value.clone() for name, value in method.student.state_dict().items()}
    trainer = Trainer(method, kit.train, settings(max_steps=4, lr=1e-2), Run())
    begun = {}

    def enter(stage, resumed, plain=method.enter):
        before = {name: value.clone() for name, value in method.student.state_dict().items()}
        plain(stage, resumed)
        begun[stage] = (before, {name: value.clone() for name, value in method.student.state_dict().items()})

    method.enter = enter
    history = trainer.train()
    lived, again = begun["again"]
    assert all(torch.equal(again[name], fresh[name]) for name in fresh), "does not start again"
    assert any(not torch.equal(lived[name], fresh[name]) for name in fresh), "did not train alone"
    assert all(torch.equal(value, lived[name]) for name, value in method.first.state_dict().items())
    assert ["kd" in row and row["kd"] != 0 for row in history.rows] == [False, False, True, True]
    assert method.finish() is method.student
    batch = kit.batch([0, 1, 2])
    method.eval()
    found = method(batch, 0.9)
    with torch.no_grad():
        pair = [kit.task.forward(model, batch).logits for model in (method.student, method.first)]
    torch.testing.assert_close(found.parts["kd"], forward_kl(*pair, 2.0))


@pytest.mark.parametrize("cut", [1, 3])
def test_both_lives_resume_bit_for_bit(kit, tmp_path, cut, monkeypatch):
    plain = kit.build
    monkeypatch.setattr(kit, "build", lambda name: plain(name, variant="self"))
    every = {"checkpoint_every": 1}
    whole, history = train(kit, "tf-kd", **every)
    with pytest.raises(RuntimeError, match="cut off"):
        train(kit, "tf-kd", tmp_path, Breaks(at=cut + 1), **every)
    resumed, rows = train(kit, "tf-kd", tmp_path, seed=8, **every)
    same_state(whole, resumed)
    assert rows.rows == history.rows
