"""Performer: its features, its estimates against their formula, and its causal form."""

import math

import pytest
import torch

from kdtool.attention import exact, performer
from kdtool.attention._base import Call

SCALE = 0.35


def config(features=16, chunk=8):
    return performer.Config(features=features, chunk=chunk, min_length=0)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kernel(q, k, count, seed=0):
    """The estimate of exp(scale q . k), written out."""
    w = performer.directions(count, q.shape[-1], seed, q.device, q.dtype)
    f = [torch.exp(x @ w.T - x.square().sum(-1, keepdim=True) / 2) for x in (q * SCALE**0.5, k * SCALE**0.5)]
    return f[0] @ f[1].mT / count


def test_directions_are_orthogonal_in_groups_and_as_long_as_normal_ones():
    w = performer.directions(20, 8, 3, torch.device("cpu"), torch.float64)
    assert w.shape == (20, 8)
    for group in (w[:8], w[8:16], w[16:]):
        inner = group @ group.T
        torch.testing.assert_close(inner, inner.diagonal().diag())
    many = performer.directions(4000, 8, 3, torch.device("cpu"), torch.float64)
    torch.testing.assert_close(many.T @ many / 4000, torch.eye(8, dtype=torch.float64), rtol=0, atol=0.1)
    assert many.square().sum(1).var() == pytest.approx(16, rel=0.2)
    assert many.mean(0).abs().max() < 4 / math.sqrt(4000)


@pytest.mark.parametrize("nq", [13, 29])
def test_it_is_its_formula(nq):
    q, k, v = draw(1, 2, nq, 8), draw(1, 2, 29, 8, seed=1), draw(1, 2, 29, 5, seed=2)
    out, lse = performer.attend(q, k, v, Call(SCALE), config())
    weights = kernel(q, k, 16)
    torch.testing.assert_close(out, weights @ v / weights.sum(-1, keepdim=True))
    torch.testing.assert_close(lse, weights.sum(-1).log())


def test_causal_is_features_for_earlier_chunks_and_exact_in_its_own():
    q, k, v = (draw(1, 2, 29, 8, seed=seed) for seed in range(3))
    valid = torch.ones(1, 29, dtype=torch.bool)
    valid[:, :11] = False  # a chunk and a half: the first rows see nothing
    out, lse = performer.attend(q, k, v, Call(SCALE, valid, True), config())
    place = torch.arange(29)
    earlier, own = place[:, None] // 8 > place // 8, place[:, None] // 8 == place // 8
    weights = torch.where(earlier, kernel(q, k, 16), torch.where(own, (q @ k.mT * SCALE).exp(), 0.0)).tril() * valid
    total = weights.sum(-1, keepdim=True)
    torch.testing.assert_close(out, weights @ v / total.clamp_min(1e-30))
    torch.testing.assert_close(lse, total.squeeze(-1).log())
    assert not out[:, :, :11].any()


@pytest.mark.parametrize("call", [Call(SCALE, causal=True), Call(SCALE, window=9)])
def test_what_needs_no_features_is_exact(call):
    q, k, v = (draw(1, 2, 29, 8, seed=seed) for seed in range(3))
    assert performer.attend(q, k, v, call, config(chunk=29))[0].equal(exact.attend(q, k, v, call)[0])


@pytest.mark.parametrize("features", [1, 24])
def test_the_denominator_is_unbiased(features):
    q, k, v = 0.7 * draw(1, 1, 6, 8), 0.7 * draw(1, 1, 10, 8, seed=1), draw(1, 1, 10, 1, seed=2)
    estimates = torch.stack(
        [performer.attend(q, k, v, Call(SCALE, seed=seed), config(features))[1].exp() for seed in range(400)]
    )
    expected = exact.attend(q, k, v, Call(SCALE))[1].exp()
    assert ((estimates.mean(0) - expected).abs() < 4 * estimates.std(0) / 20).all()


def test_the_error_falls_like_one_over_the_root_of_the_number_of_features():
    """On small logits: on larger ones few features carry the sums, and the error falls more slowly at first."""
    q, k, v = (draw(1, 2, 64, 8, seed=seed) for seed in range(3))
    expected = exact.attend(q, k, v, Call(0.05))[0]
    counts = (16, 64, 256, 1024)
    errors = [
        sum(float((performer.attend(q, k, v, Call(0.05, seed=s), config(m))[0] - expected).norm()) for s in range(8))
        for m in counts
    ]
    slope = math.log(errors[-1] / errors[0]) / math.log(counts[-1] / counts[0])
    assert errors == sorted(errors, reverse=True)
    assert -0.65 < slope < -0.35


@pytest.mark.parametrize("causal", [False, True])
def test_padding_behind_is_as_if_it_were_not_there(causal):
    q, k, v = draw(1, 4, 51, 8), draw(1, 2, 51, 8, seed=1), draw(1, 2, 51, 8, seed=2)
    valid = torch.arange(51).unsqueeze(0) < 40
    found = performer.attend(q, k, v, Call(SCALE, valid, causal), config())[0][:, :, :40]
    cropped = performer.attend(*(x[:, :, :40] for x in (q, k, v)), Call(SCALE, causal=causal), config())[0]
    torch.testing.assert_close(found, cropped)


@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_of_padding_is_zero(causal):
    q, k, v = (draw(2, 2, 30, 8, seed=seed).requires_grad_() for seed in range(3))
    valid = torch.tensor([[True], [False]]).expand(-1, 30)
    out, lse = performer.attend(q, k, v, Call(SCALE, valid, causal), config())
    assert not out[1].any()
    assert torch.isinf(lse[1]).all()
    assert torch.isfinite(lse[0]).all()
    gradients = torch.autograd.grad(out.sin().sum(), (q, k, v))
    assert all(torch.isfinite(x).all() and not x[1].any() for x in gradients)


def test_a_negative_scale_turns_the_queries_round():
    q, k, v = (draw(1, 2, 20, 8, seed=seed) for seed in range(3))
    one = performer.attend(q, k, v, Call(-SCALE), config())[0]
    assert one.equal(performer.attend(-q, k, v, Call(SCALE), config())[0])


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_match_differences(causal):
    q, k, v = (draw(1, heads, 26, 6, seed=seed).requires_grad_() for seed, heads in enumerate((4, 2, 2)))
    valid = (torch.arange(26) >= 3).unsqueeze(0)
    call, upstream = Call(SCALE, valid, causal), draw(1, 4, 26, 6, seed=7)

    def loss(q, k, v):
        return (performer.attend(q, k, v, call, config())[0] * upstream).sum()

    found = torch.autograd.grad(loss(q, k, v), (q, k, v))
    for place, gradient in enumerate(found):
        step = 1e-6 * draw(*gradient.shape, seed=8)
        with torch.no_grad():
            ends = [loss(*(x + sign * step if i == place else x for i, x in enumerate((q, k, v)))) for sign in (1, -1)]
        torch.testing.assert_close((gradient * step).sum(), (ends[0] - ends[1]) / 2, rtol=1e-5, atol=1e-12)
