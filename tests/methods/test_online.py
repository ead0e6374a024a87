"""Networks that train together: what each loss sees, and that teachers really train."""

import json

import pytest
import torch
from torch.nn import functional

from kdtool import load
from kdtool.config import load_config
from kdtool.errors import UsageProblem
from kdtool.methods.bd_kd import bd_loss
from kdtool.methods.dml import mutual_loss
from kdtool.methods.kdcl import collective
from kdtool.pipelines import distill
from tests.kits import make_kit

LABELS = torch.tensor([0, 3, 1, 4, 4, 2])


def logits(count=2, classes=5):
    generator = torch.Generator().manual_seed(1)
    return [2 * torch.randn(6, classes, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_no_gradient_crosses_between_the_networks():
    student, teacher = (z.requires_grad_() for z in logits())
    found = bd_loss(student, teacher, LABELS)
    assert torch.autograd.grad(found.student, teacher, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(found.teacher, student, allow_unused=True) == (None,)


def test_equal_logits_diverge_nowhere_and_weigh_alike():
    z = logits()[0]
    found = bd_loss(z, z.clone(), LABELS, delta=3.0)
    assert found.forward.abs().max() < 1e-12
    assert found.reverse.abs().max() < 1e-12
    assert found.weight_forward.eq(1).all()
    assert found.weight_reverse.eq(1).all()
    near = bd_loss(z, 1.01 * z, LABELS, delta=3.0, dead_zone=0.5)
    assert near.weight_forward.eq(1).all()


def test_the_weights_go_to_the_divergence_that_a_sample_needs():
    student, teacher = logits()
    found = bd_loss(5 * student, teacher, LABELS, delta=2.0)
    swapped = found.weight_reverse * found.forward + found.weight_forward * found.reverse
    right = found.weight_forward * found.forward + found.weight_reverse * found.reverse
    assert found.weight_forward.eq(2).double().mean() > 0.8
    assert not torch.allclose(right.sum(), swapped.sum())


def test_a_sharp_student_becomes_less_sure():
    student, teacher = logits()
    sharp = (5 * student).requires_grad_()
    found = bd_loss(sharp, 0.1 * teacher, sharp.argmax(-1), delta=2.0)
    assert found.weight_forward.eq(2).all()
    (gradient,) = torch.autograd.grad(found.student, sharp)
    before, after = (z.softmax(-1).amax(-1).mean() for z in (sharp, sharp - 0.05 * gradient))
    assert after < before


def test_dml_is_cross_entropy_and_the_mean_divergence():
    given = logits(3)
    for k, loss in enumerate(mutual_loss(given, LABELS, 0.7)):
        mutual = sum(
            functional.kl_div(given[k].log_softmax(-1), z.log_softmax(-1), log_target=True, reduction="sum")
            for j, z in enumerate(given)
            if j != k
        )
        expected = functional.cross_entropy(given[k], LABELS, reduction="sum") + 0.7 * mutual / 2
        torch.testing.assert_close(loss, expected)


def test_kdcl_targets():
    given = logits(3)
    wrong = torch.stack([functional.cross_entropy(z, LABELS, reduction="none") for z in given])
    naive = collective(given, LABELS, "naive")
    for row, best in enumerate(wrong.argmin(0)):
        assert naive[row].equal(given[best][row])
    least = collective(given, LABELS, "minlogit")
    assert least.gather(1, LABELS[:, None]).abs().max() == 0
    expected = torch.stack([z - z.gather(1, LABELS[:, None]) for z in given]).amin(0)
    torch.testing.assert_close(least, expected)
    linear = collective(given, LABELS, "linear")
    error = functional.cross_entropy(linear, LABELS)
    for z in (*given, sum(given) / 3):
        assert error <= functional.cross_entropy(z, LABELS) + 1e-6
    # a network that knows the labels gets all of the share
    sure = 30 * functional.one_hot(LABELS, 5).double()
    torch.testing.assert_close(collective([-sure, sure], LABELS, "linear"), sure)


@pytest.mark.parametrize("name", ["bd-kd", "dml", "kdcl"])
def test_the_teacher_trains_and_can_start_anew(name, models, data):
    kit = make_kit("text-classification", models, data)
    method = kit.build(name)
    losses = method(kit.batch([0, 1, 2, 3]), 0.5)
    losses.total.backward()
    assert all(p.grad is not None for p in method.peers.parameters() if p.requires_grad)
    assert any(p.grad.any() for p in method.peers.parameters() if p.grad is not None)
    anew = kit.build(name, random_teacher=True)
    pairs = zip(method.peers[0].parameters(), anew.peers[0].parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_a_trained_teacher_is_kept_on_request(models, data, tmp_path):
    options = {
        "teacher.model": str(models("bert")),
        "student.model": "layers:1",
        "data.source": str(data("text")),
        "data.task": "text-classification",
        "output.folder": str(tmp_path / "out"),
        "output.save_teacher": True,
        "method.name": "bd-kd",
        "train.max_steps": 2,
        "eval.latency": False,
        "eval.reload": False,
        "output.plots": False,
    }
    result = distill(load_config("distill", None, [], options))
    kept = load(tmp_path / "out" / "teacher", "text-classification").state_dict()
    before = load(models("bert"), "text-classification").state_dict()
    assert any(not torch.equal(kept[key], before[key]) for key in before)
    assert result.proof.teacher is not None
    files = json.loads((tmp_path / "out" / "kdtool.json").read_text())["files"]
    assert any(str(name).startswith("teacher/") for name in files)
    distill(load_config("distill", None, [], options | {"output.save_teacher": False, "output.overwrite": True}))
    assert not list((tmp_path / "out" / "teacher").glob("*.safetensors")), (
        "a teacher of another run is no teacher of this"
    )
    with pytest.raises(UsageProblem, match="trains no teacher"):
        distill(load_config("distill", None, [], options | {"method.name": "kd", "output.folder": str(tmp_path / "b")}))
