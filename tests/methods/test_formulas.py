"""Each method's loss, written out from the model outputs it is made of."""

import pytest
import torch
from torch.nn import functional

from tests.kits import make_kit

ROWS = [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def text(models, data):
    return make_kit("text-classification", models, data)


def parts(kit, method):
    batch = kit.batch(ROWS)
    with torch.no_grad():
        student = kit.task.forward(method.student, batch)
        teacher = kit.task.forward(method.teacher_list[0].model, batch)
    return method.eval()(batch, 0.0), student.logits, teacher.logits, student.labels


def softened(student, teacher, t):
    p, q = (z / t for z in (teacher, student))
    return t * t * (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()


def test_kd(text):
    found, student, teacher, labels = parts(text, text.build("kd", temperature=3.0, ce_weight=0.2, kd_weight=0.7))
    ce = functional.cross_entropy(student, labels, reduction="sum")
    torch.testing.assert_close(found.total, 0.2 * ce + 0.7 * softened(student, teacher, 3.0))
    torch.testing.assert_close(found.parts["ce"], ce)
    assert found.count == len(ROWS)


def test_logit_mse(text):
    found, student, teacher, labels = parts(text, text.build("logit-mse", ce_weight=0.5, mse_weight=2.0))
    expected = 0.5 * functional.cross_entropy(student, labels, reduction="sum")
    expected += 2.0 * ((student - teacher) ** 2).mean(1).sum()
    torch.testing.assert_close(found.total, expected)


def test_logit_standardization(text):
    found, student, teacher, _ = parts(text, text.build("logit-standardization", ce_weight=0.0))
    shaped = [(z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True, unbiased=False) for z in (student, teacher)]
    torch.testing.assert_close(found.total, 9.0 * softened(*shaped, 2.0), rtol=1e-5, atol=1e-6)


def test_label_smoothing_and_none(text):
    for name, epsilon in (("label-smoothing", 0.1), ("none", 0.0)):
        found, student, _, labels = parts(text, text.build(name))
        expected = functional.cross_entropy(student, labels, reduction="sum", label_smoothing=epsilon)
        torch.testing.assert_close(found.total, expected)


def test_weights_of_zero_switch_terms_off(text):
    found, student, teacher, _ = parts(text, text.build("kd", ce_weight=0.0, kd_weight=1.0, temperature=1.0))
    torch.testing.assert_close(found.total, softened(student, teacher, 1.0))
    assert "ce" not in found.parts
