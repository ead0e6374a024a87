"""Nystromformer: what it keeps exactly, and that more landmarks are better."""

import pytest
import torch

from kdtool.attention import exact, nystrom
from kdtool.attention._base import Call

SCALE = 0.35


def config(landmarks=8, iterations=6):
    return nystrom.Config(landmarks=landmarks, iterations=iterations, min_length=0)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def smooth(n, seed):
    """Neighbours are alike, as in texts and images."""
    return draw(1, 2, n // 8, 8, seed=seed).repeat_interleave(8, 2) + 0.2 * draw(1, 2, n, 8, seed=seed + 1)


def test_segments_share_the_valid_positions_evenly_and_in_order():
    valid = torch.ones(2, 21, dtype=torch.bool)
    valid[1, :4] = valid[1, 11] = False
    member = nystrom.segments(21, 4, valid, valid.device)
    assert member.sum(1).equal(valid.float())
    assert member.sum(2).tolist() == [[6, 5, 5, 5], [4, 4, 4, 4]]
    own = member.argmax(1)
    assert all((own[row, valid[row]].diff() >= 0).all() for row in range(2))


def test_the_iteration_finds_the_inverse():
    a = torch.softmax(2 * draw(3, 6, 6), -1)
    z = nystrom.inverse(a, 25)
    torch.testing.assert_close(a @ z @ a, a, rtol=0, atol=1e-8)


@pytest.mark.parametrize("iterations", [1, 3, 6])
def test_equal_values_come_out_as_they_are_before_the_iteration_has_converged(iterations):
    q, k = 3 * draw(1, 2, 64, 8), 3 * draw(1, 2, 64, 8, seed=1)
    out = nystrom.attend(q, k, torch.ones_like(k), Call(SCALE), config(16, iterations))[0]
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-9)


def test_it_is_exact_where_segments_are_uniform():
    q, k = (draw(1, 2, 6, 8, seed=seed).repeat_interleave(5, 2) for seed in (0, 1))
    v = draw(1, 2, 30, 5, seed=2)
    found = nystrom.attend(q, k, v, Call(SCALE), config(6, 30))
    for one, other in zip(found, exact.attend(q, k, v, Call(SCALE)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize("call", [Call(SCALE, causal=True), Call(SCALE, window=9), Call(SCALE)])
def test_what_it_has_no_form_for_is_exact(call):
    queries = 20 if call == Call(SCALE) else 64
    q, k, v = draw(1, 2, queries, 8), draw(1, 2, 64, 8, seed=1), draw(1, 2, 64, 8, seed=2)
    assert nystrom.attend(q, k, v, call, config())[0].equal(exact.attend(q, k, v, call)[0])


def test_the_error_falls_with_the_number_of_landmarks():
    q, k, v = (smooth(256, seed) for seed in (0, 10, 20))
    expected = exact.attend(q, k, v, Call(SCALE))[0]
    found = [nystrom.attend(q, k, v, Call(SCALE), config(m, 12))[0] for m in (4, 16, 64, 256)]
    errors = [float((one - expected).norm() / expected.norm()) for one in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < errors[0] / 2
    assert errors[3] == 0


@pytest.mark.parametrize("front", [0, 5, 11])
def test_padding_is_as_if_it_were_not_there(front):
    q, k, v = (draw(1, 4, 40, 8), draw(1, 2, 40, 8, seed=1), draw(1, 2, 40, 8, seed=2))
    valid = torch.zeros(1, 51, dtype=torch.bool)
    valid[:, front : front + 40] = True
    padded = [torch.full((1, x.shape[1], 51, 8), 4.0, dtype=x.dtype) for x in (q, k, v)]
    for whole, part in zip(padded, (q, k, v), strict=True):
        whole[:, :, front : front + 40] = part
    found = nystrom.attend(*padded, Call(SCALE, valid), config())
    for one, other in zip(found, nystrom.attend(q, k, v, Call(SCALE), config()), strict=True):
        torch.testing.assert_close(one[:, :, front : front + 40], other)


def test_rows_with_few_keys_or_none():
    """Fewer positions than landmarks: each is its own landmark, and the empty segments answer nothing."""
    q, k, v = (draw(2, 2, 30, 8, seed=seed) for seed in range(3))
    valid = torch.zeros(2, 30, dtype=torch.bool)
    valid[0, 3:8] = True
    for x in (q, k, v):
        x.requires_grad_()
    call = Call(SCALE, valid)
    out, lse = nystrom.attend(q, k, v, call, config(8, 40))
    expected, expected_lse = exact.attend(q, k, v, call)
    torch.testing.assert_close(out[0, :, 3:8], expected[0, :, 3:8], rtol=0, atol=1e-6)
    torch.testing.assert_close(lse[0, :, 3:8], expected_lse[0, :, 3:8])
    assert not out[1].any()
    assert torch.isinf(lse[1]).all()
    gradients = torch.autograd.grad(out.sin().sum(), (q, k, v))
    assert all(torch.isfinite(x).all() and not x[1].any() for x in gradients)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_match_differences(masked):
    q, k, v = (draw(1, heads, 26, 6, seed=seed).requires_grad_() for seed, heads in enumerate((4, 2, 2)))
    valid = torch.ones(1, 26, dtype=torch.bool)
    valid[:, -5:] = not masked
    call, upstream = Call(SCALE, valid), draw(1, 4, 26, 6, seed=7)

    def loss(q, k, v):
        return (nystrom.attend(q, k, v, call, config(6))[0] * upstream).sum()

    found = torch.autograd.grad(loss(q, k, v), (q, k, v))
    for place, gradient in enumerate(found):
        step = 1e-6 * draw(*gradient.shape, seed=8)
        with torch.no_grad():
            ends = [loss(*(x + sign * step if i == place else x for i, x in enumerate((q, k, v)))) for sign in (1, -1)]
        torch.testing.assert_close((gradient * step).sum(), (ends[0] - ends[1]) / 2, rtol=1e-5, atol=1e-12)
