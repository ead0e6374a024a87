import pytest
import torch
from torch.nn import functional

from kdtool.methods._targets import caution
from kdtool.methods.nkd import nkd_terms
from kdtool.registry import METHODS
from kdtool.run import Run, Silent
from kdtool.train.loop import Trainer
from tests.contract.test_methods import settings
from tests.kits import make_kit

LABELS = torch.tensor([0, 3, 1, 4, 4, 2])


def logits(classes=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    student, teacher = (2 * torch.randn(6, classes, generator=generator, dtype=dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def test_gradients_have_the_closed_form():
    student, teacher = logits()
    onehot = functional.one_hot(LABELS, 5).double()
    target, nontarget = nkd_terms(student, teacher, LABELS, 3.0)
    (by_target,) = torch.autograd.grad(target, student)
    q, p = teacher.softmax(-1), student.detach().softmax(-1)
    torch.testing.assert_close(by_target, (q * onehot).sum(1, keepdim=True) * (p - onehot))
    (by_others,) = torch.autograd.grad(nontarget, student)
    rest = [(z.detach() / 3).masked_fill(onehot.bool(), -torch.inf).softmax(-1) for z in (student, teacher)]
    torch.testing.assert_close(by_others, 3.0 * (rest[0] - rest[1]))
    assert (by_others[onehot.bool()] == 0).all()


def test_the_teachers_confidence_touches_the_target_term_alone():
    student, teacher = logits()
    first = nkd_terms(student, teacher, LABELS, 2.0)
    raised = teacher + 1.5 * functional.one_hot(LABELS, 5)
    second = nkd_terms(student, raised, LABELS, 2.0)
    torch.testing.assert_close(first[1], second[1])
    assert not torch.isclose(first[0], second[0])
    for left, right in zip(first, nkd_terms(student + 3, teacher - 7, LABELS, 2.0), strict=True):
        torch.testing.assert_close(left, right)


def test_others_are_renormalised():
    """Dropping a column after the softmax is another loss."""
    student, teacher = logits()
    mask = functional.one_hot(LABELS, 5).bool()
    fake = -(teacher.softmax(-1) * student.log_softmax(-1)).masked_fill(mask, 0.0).sum()
    assert not torch.isclose(nkd_terms(student, teacher, LABELS)[1], fake, rtol=0.01)


def test_two_classes_have_no_others():
    student, teacher = logits(2)
    assert nkd_terms(student, teacher, LABELS % 2)[1] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sure_teachers_and_small_formats_stay_finite(dtype):
    student, teacher = (z.detach() for z in logits(dtype=torch.float32))
    student = (20 * student).to(dtype).requires_grad_()
    terms = nkd_terms(student, (60 * teacher).to(dtype), LABELS)
    sum(terms).backward()
    assert all(term.dtype == torch.float32 and torch.isfinite(term) for term in terms)
    assert torch.isfinite(student.grad).all()


class Hears(Silent):
    def __init__(self):
        self.warned = []

    def warn(self, message):
        self.warned.append(message)


@pytest.mark.parametrize(
    ("name", "values", "warns"),
    [
        ("nkd", {}, False),
        ("nkd", {"gamma": 3.5, "temperature": 3.0}, True),
        ("dkd", {}, True),
        ("dkd", {"beta": 0.5, "temperature": 1.0}, False),
        ("combine", {"terms": ["kd:1", "dkd:1"]}, True),
    ],
)
def test_large_weights_in_short_schedules_are_warned_of(models, data, name, values, warns):
    kit = make_kit("text-classification", models, data)
    heard = Hears()
    Trainer(kit.build(name, **values), kit.train, settings(max_steps=1), Run(reporter=heard))
    assert len(heard.warned) == warns
    assert all("temperature^2" in message and "epochs" in message for message in heard.warned)


def test_long_schedules_are_not():
    assert caution("nkd", "gamma * temperature^2", 31.5, 5)
    assert not caution("nkd", "gamma * temperature^2", 31.5, 20)
    assert METHODS.info("nkd").facts["tasks"] >= {"image-classification"}
