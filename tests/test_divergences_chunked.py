"""The divergences of language models: formulas, and the chunked form against logits held as a whole."""

import pytest
import torch
from torch.nn import functional

from kdtool.divergences import KINDS, Divergence, Head, compare, divergence

ROWS, WIDTH, WIDER, TOKENS = 7, 4, 6, 11


def formula(kind, z_s, z_t, beta=0.3, skew=0.2, temperature=1.7):
    q, p = (z_s / temperature).softmax(-1), (z_t / temperature).softmax(-1)

    def kl(a, b):
        return (a * (a.log() - b.log())).sum()

    m = beta * p + (1 - beta) * q
    return {
        "forward-kl": lambda: kl(p, q),
        "reverse-kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "tvd": lambda: 0.5 * (p - q).abs().sum(),
        "skewed-kl": lambda: kl(p, skew * p + (1 - skew) * q),
        "skewed-reverse-kl": lambda: kl(q, (1 - skew) * p + skew * q),
    }[kind]()


def made(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, matrix, bias = normal(ROWS, WIDTH), normal(TOKENS, WIDTH), normal(TOKENS)
    labels = torch.randint(TOKENS, (ROWS,), generator=generator)
    leaves = [value.requires_grad_() for value in (hidden, matrix, bias)]
    return leaves, (normal(ROWS, WIDER), Head(normal(TOKENS, WIDER))), labels


@pytest.mark.parametrize("kind", KINDS)
def test_dense_form_is_the_formula_and_its_derivative(kind):
    (hidden, matrix, _), (h_t, head_t), _ = made()
    z_s, z_t = (hidden @ matrix.T).detach().requires_grad_(), head_t.logits(h_t)
    expected = formula(kind, z_s, z_t)
    (grad,) = torch.autograd.grad(expected, z_s)
    found = divergence(z_s, z_t, Divergence(kind, 0.3, 0.2, 1.7))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * found, z_s)[0], 3 * grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, 3.0)])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_chunked_form_is_the_formula(kind, scale, cap, rows):
    (hidden, matrix, bias), teacher, labels = made()
    z = (hidden @ matrix.T + bias) * scale
    z = z if cap is None else cap * torch.tanh(z / cap)
    apart, ce = formula(kind, z, teacher[1].logits(teacher[0])), functional.cross_entropy(z, labels, reduction="sum")
    expected = 0.7 * apart + 0.4 * ce
    gradients = torch.autograd.grad(expected, (hidden, matrix, bias))
    which = Divergence(kind, 0.3, 0.2, 1.7)
    found = compare(hidden, Head(matrix, bias, scale, cap), teacher, labels, which, 0.7, 0.4, rows)
    for value, exact in zip(found, (expected, ce, apart), strict=True):
        torch.testing.assert_close(value.detach(), exact.detach())
    for value, exact in zip(torch.autograd.grad(found[0], (hidden, matrix, bias)), gradients, strict=True):
        torch.testing.assert_close(value, exact)


def test_frozen_heads_half_precision_and_cut_vocabularies():
    (hidden, matrix, _), teacher, labels = made(torch.bfloat16)
    frozen = Head(matrix.detach()).cut(9)
    total, _, _ = compare(hidden, frozen, (teacher[0], teacher[1].cut(9)), labels.clamp_max(8), ce_weight=1.0, rows=2)
    assert total.dtype == torch.float32
    total.backward()
    assert matrix.grad is None
    assert hidden.grad.dtype == torch.bfloat16
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_masked_vocabulary_stays_finite(kind):
    z = torch.zeros(2, 4)
    z[:, 3] = -torch.inf
    student = z.clone().requires_grad_()
    loss = divergence(student, z, Divergence(kind))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(student.grad).all()
