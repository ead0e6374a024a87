"""ONE: its equations, its one trunk, and the plain student that is left."""

import pytest
import torch
from torch.nn import functional

from kdtool.errors import ConfigProblem
from kdtool.methods.one import ensemble_loss
from tests.kits import make_kit

LABELS = torch.tensor([0, 3, 1, 4])
TASKS = ("text-classification", "image-classification", "audio-classification", "tabular-classification")


@pytest.fixture(params=TASKS)
def kit(request, models, data):
    return make_kit(request.param, models, data)


def hooks(model):
    return {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}


def test_losses_are_those_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    gates = torch.rand(4, 3, generator=generator, dtype=torch.float64).softmax(-1)
    own, together, apart = ensemble_loss(logits, gates, LABELS, 0.5, 3.0)
    mixed = sum(gates[:, k : k + 1] * z for k, z in enumerate(logits))
    torch.testing.assert_close(own, sum(functional.cross_entropy(z, LABELS, reduction="sum") for z in logits))
    torch.testing.assert_close(together, functional.cross_entropy(mixed, LABELS, reduction="sum"))
    each = [functional.kl_div((z / 3).log_softmax(-1), (mixed / 3).softmax(-1), reduction="sum") for z in logits]
    torch.testing.assert_close(apart, 0.5 * 9 * sum(each))
    (gradient,) = torch.autograd.grad(apart, logits[0])
    torch.testing.assert_close(gradient, 0.5 * 3 * ((logits[0] / 3).softmax(-1) - (mixed / 3).softmax(-1)).detach())


def test_a_branch_with_the_students_weights_says_what_the_student_says(kit):
    method = kit.build("one")
    method.eval()
    own = method.student.state_dict()
    for branch in method.others:
        branch.load_state_dict({name: own[name] for name in branch.state_dict()})
    logits, gates, _ = method.logits(kit.batch([0, 1, 2]))
    assert len(logits) == 3
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gates.sum(1), torch.ones(3))


def test_the_trunk_is_one_and_hears_every_branch(kit):
    method = kit.build("one")
    trunk = {id(p) for module in method._trunk.values() for p in module.parameters()}
    branches = {id(p) for p in method.others.parameters()}
    assert trunk
    assert not trunk & branches
    logits, _, _ = method.logits(kit.batch([0, 1, 2]))
    shared = [p for p in method.student.parameters() if id(p) in trunk and p.requires_grad]
    found = torch.autograd.grad(logits[1].square().sum(), shared, allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in found)


def test_branches_differ_at_the_start_and_nothing_is_left_of_them(kit):
    method = kit.build("one")
    plain = kit.copy(kit.student).model
    kit.task.forward(plain, kit.batch([0, 1]))  # transformers hangs its own hooks on some models then
    logits, _, _ = method.logits(kit.batch([0, 1, 2]))
    assert not torch.allclose(logits[1], logits[2])
    left = method.finish()
    assert left is method.student
    assert hooks(left) == hooks(plain)


def test_a_stage_that_is_not_there_is_refused(models, data):
    with pytest.raises(ConfigProblem, match="stages 0 to"):
        make_kit("text-classification", models, data).build("one", split=9)
