"""DKD, WSLD and DIST from their formulas, at the edges where careless forms break."""

import pytest
import torch
from torch.nn import functional

from kdtool.divergences import forward_kl
from kdtool.methods.dist import dist_terms
from kdtool.methods.dkd import dkd_terms
from kdtool.methods.wsld import wsld_loss

LABELS = torch.tensor([0, 3, 1, 2])


def logits(scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    student, teacher = (scale * torch.randn(4, 5, generator=generator, dtype=dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def test_dkd_decouples_the_divergence():
    """KL(p_t || p_s) = KL(b_t || b_s) + (1 - p_t[y]) * KL(n_t || n_s): equation 6 of the paper, unit by unit."""
    student, teacher = (z.detach().float() for z in logits())
    for i in range(len(LABELS)):
        row = slice(i, i + 1)
        target, nontarget = dkd_terms(student[row], teacher[row], LABELS[row], 2.0)
        rest = 1 - (teacher[row] / 2).softmax(-1)[0, LABELS[i]]
        torch.testing.assert_close(target + rest * nontarget, forward_kl(student[row], teacher[row], 2.0))


@pytest.mark.parametrize("loss", [dkd_terms, wsld_loss])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sure_models_in_small_formats_stay_finite(loss, dtype):
    student, teacher = logits(300.0, torch.float32)
    student = student.detach().to(dtype).requires_grad_()
    found = loss(student, teacher.to(dtype), LABELS, 1.0)
    total = sum(found) if isinstance(found, tuple) else found
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(student.grad).all()


def test_wsld_drops_the_soft_labels_of_units_the_student_has_learnt():
    _, teacher = logits()
    learnt = 50.0 * functional.one_hot(LABELS, 5).double()
    assert wsld_loss(learnt, teacher, LABELS) < 1e-6
    wrong = learnt.roll(1, 1)
    soft = functional.cross_entropy(wrong / 4, (teacher / 4).softmax(-1), reduction="sum")
    torch.testing.assert_close(
        wsld_loss(wrong, teacher, LABELS, 4.0), 16 * soft, rtol=1e-5, atol=0
    )  # all weights are 1


def test_wsld_weights_carry_no_gradient():
    student, teacher = logits()
    (found,) = torch.autograd.grad(wsld_loss(student, teacher, LABELS, 1.0), student)
    with torch.no_grad():
        errors = [functional.cross_entropy(z, LABELS, reduction="none") for z in (student, teacher)]
        weights = 1 - torch.exp(-errors[0] / errors[1])
        expected = weights[:, None] * (student.softmax(-1) - teacher.softmax(-1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_dist_is_zero_where_probabilities_are_linear_in_each_other():
    student, teacher = logits()
    inter, intra = dist_terms(teacher, teacher)
    assert abs(inter) < 1e-5
    assert abs(intra) < 1e-5
    assert all(term > 0.01 for term in dist_terms(student, teacher))
    mixed = (0.5 * teacher.softmax(-1) + 0.1).log()  # half the spread, the same order
    assert all(abs(term) < 1e-5 for term in dist_terms(mixed, teacher))


def test_dist_of_a_student_equal_to_its_teacher_has_no_gradient():
    _, teacher = logits()
    same = teacher.clone().requires_grad_()
    (found,) = torch.autograd.grad(sum(dist_terms(same, teacher)), same)
    assert found.abs().max() < 1e-5  # what the 1e-8 in the denominator leaves


def test_dist_of_constant_rows_is_finite():
    student = torch.zeros(4, 5, requires_grad=True)
    sum(dist_terms(student, logits(dtype=torch.float32)[1])).backward()
    assert torch.isfinite(student.grad).all()
