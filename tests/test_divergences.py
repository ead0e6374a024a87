"""Divergences against their formulas, written out in float64."""

import pytest
import torch
from torch.nn import functional

from kdtool.divergences import cross_entropy, forward_kl, squared_error, standardize

UNITS, CLASSES = 7, 5


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return tuple(3 * torch.randn(UNITS, CLASSES, generator=generator) for _ in range(2))


@pytest.fixture
def labels():
    return torch.tensor([0, 4, 2, 2, 1, 3, 0])


def derivative(loss, student):
    point = student.clone().requires_grad_()
    loss(point).backward()
    return point.grad


def by_hand(student, teacher, temperature):
    """T^2 * sum p_t (log p_t - log p_s)."""
    p, q = ((z.double() / temperature).softmax(-1) for z in (teacher, student))
    return temperature**2 * (p * (p.log() - q.log())).sum()


def test_at_temperature_1_it_is_cross_entropy_less_entropy(pair):
    student, teacher = pair
    p = teacher.softmax(-1)
    cross = -(p * student.log_softmax(-1)).sum()
    entropy = -(p * teacher.log_softmax(-1)).sum()
    torch.testing.assert_close(forward_kl(student, teacher), cross - entropy)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_forward_kl_and_its_gradient(pair, temperature):
    student, teacher = pair
    torch.testing.assert_close(
        forward_kl(student, teacher, temperature).double(), by_hand(student, teacher, temperature), rtol=1e-5, atol=1e-6
    )
    found = derivative(lambda z: forward_kl(z, teacher, temperature), student)
    exact = derivative(lambda z: by_hand(z, teacher, temperature), student.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    closed = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
    torch.testing.assert_close(found, closed, rtol=1e-5, atol=1e-6)


def test_direction_is_from_the_teacher(pair):
    student, teacher = pair
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=teacher), torch.distributions.Categorical(logits=student)
    ).sum()
    torch.testing.assert_close(forward_kl(student, teacher), expected)
    assert not torch.isclose(forward_kl(teacher, student), expected)


def test_gradients_of_high_temperatures_keep_their_size(pair):
    """With T^2 the gradient tends to (z_s - z_t) / C for centred logits, whatever T."""
    student, teacher = (z - z.mean(-1, keepdim=True) for z in pair)
    found = derivative(lambda z: forward_kl(z, teacher, 1000.0), student)
    torch.testing.assert_close(found, (student - teacher) / CLASSES, rtol=2e-2, atol=5e-3)


def test_losses_add_up_over_units(pair, labels):
    student, teacher = pair
    for loss in (
        lambda rows: forward_kl(student[rows], teacher[rows], 2.0),
        lambda rows: cross_entropy(student[rows], labels[rows], 0.1),
        lambda rows: squared_error(student[rows], teacher[rows]),
    ):
        parts = [loss(slice(i, i + 1)) for i in range(UNITS)]
        torch.testing.assert_close(loss(slice(None)), torch.stack(parts).sum())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(pair, labels, smoothing):
    student, _ = pair
    target = (1 - smoothing) * functional.one_hot(labels, CLASSES) + smoothing / CLASSES
    expected = -(target.double() * student.double().log_softmax(-1)).sum()
    torch.testing.assert_close(cross_entropy(student, labels, smoothing).double(), expected, rtol=1e-6, atol=1e-6)


def test_squared_error(pair):
    student, teacher = pair
    expected = sum(((student[i] - teacher[i]) ** 2).sum() / CLASSES for i in range(UNITS))
    torch.testing.assert_close(squared_error(student, teacher), expected)


def test_standardize(pair):
    z = standardize(pair[0])
    torch.testing.assert_close(z.mean(-1), torch.zeros(UNITS), rtol=0, atol=1e-6)
    torch.testing.assert_close(z.square().mean(-1).sqrt(), torch.ones(UNITS), rtol=1e-5, atol=0)
    torch.testing.assert_close(standardize(5 * pair[0] + 3), z, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(standardize(torch.full((2, 4), 7.0))).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(pair, labels, dtype):
    student, teacher = (z.to(dtype) for z in pair)
    for loss in (forward_kl(student, teacher, 2.0), cross_entropy(student, labels), squared_error(student, teacher)):
        assert loss.dtype == torch.float32
    torch.testing.assert_close(forward_kl(student, teacher, 2.0), forward_kl(student.float(), teacher.float(), 2.0))


def test_certain_teachers_stay_finite(labels):
    teacher = 1000.0 * functional.one_hot(labels, CLASSES).float()
    student = -teacher
    grad = derivative(lambda z: forward_kl(z, teacher), student)
    assert torch.isfinite(forward_kl(student, teacher))
    assert torch.isfinite(grad).all()
