"""What every registered attention operator must do, on small inputs with its approximation switched on."""

import pytest
import torch

from kdtool.attention import _flash, exact
from kdtool.attention._base import Call
from kdtool.registry import ATTENTION

SMALL = {
    "bucket": 8,
    "samples": 8,
    "leaf": 4,
    "near": 2,
    "block": 8,
    "chunk": 16,
    "landmarks": 8,
    "features": 16,
    "min_length": 0,
}
FORMS = {"cluster, shared": ("cluster", {"block": 0})}
"""Settings that make another operator out of one."""
each = pytest.mark.parametrize("name", [*ATTENTION.names(), *FORMS])


def operator(name, **values):
    """`attend` of an operator with settings small enough for the tests."""
    name, form = FORMS.get(name, (name, {}))
    known = {setting.name for setting in ATTENTION.info(name).settings}
    config = ATTENTION.build_config(name, {k: v for k, v in (SMALL | form | values).items() if k in known})
    attend = ATTENTION.get(name)
    return lambda q, k, v, call: attend(q, k, v, call, config)


def inputs(nq=45, n=45, heads=4, kv=4, wide=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(2, heads, nq, 8), draw(2, kv, n, 8), draw(2, kv, n, wide)


def mask(n=45):
    """The second row is padded in front and behind."""
    seen = torch.ones(2, n, dtype=torch.bool)
    seen[1, :5] = seen[1, -7:] = False
    return seen


CALLS = {
    "plain": Call(0.35),
    "mask": Call(0.35, mask()),
    "causal": Call(0.35, causal=True),
    "causal mask": Call(0.35, mask(), True),
    "window": Call(0.35, window=6),
    "causal window": Call(0.35, mask(), True, 6),
}
any_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@each
def test_says_where_it_comes_from(name):
    info = ATTENTION.info(FORMS.get(name, (name,))[0])
    assert info.summary.endswith(".")
    assert info.facts["paper"]
    assert isinstance(info.facts["causal"], bool)
    assert all(setting.doc for setting in info.settings)


@each
@any_call
@pytest.mark.parametrize("kv", [4, 2, 1])
def test_equal_values_come_out_as_they_are(name, call, kv):
    q, k, v = inputs(kv=kv)
    out, lse = operator(name)(q, k, torch.ones_like(v), call)
    seen = ~torch.isinf(lse)
    torch.testing.assert_close(out, seen.unsqueeze(-1).expand_as(out).float(), rtol=0, atol=1e-5)
    assert out.shape == (2, 4, 45, 8)
    assert lse.shape == (2, 4, 45)


masked = pytest.mark.parametrize("call", [call for call in CALLS.values() if call.key_mask is not None])


@each
@masked
def test_masked_positions_change_nothing(name, call):
    """Neither as keys nor, in self-attention, as queries of other rows."""
    q, k, v = inputs()
    seen = call.key_mask[:, None, :, None]
    before = operator(name)(q, k, v, call)[0]
    as_keys = operator(name)(q, k.masked_fill(~seen, 50.0), v.masked_fill(~seen, -50.0), call)[0]
    assert as_keys.equal(before)
    as_queries = operator(name)(q.masked_fill(~seen, 7.0), k, v, call)[0]
    assert as_queries.masked_fill(~seen, 0.0).equal(before.masked_fill(~seen, 0.0))


@each
@pytest.mark.parametrize(("kv", "seen"), [(4, None), (2, None), (4, mask(80))])
def test_causal_rows_do_not_see_what_comes_later(name, kv, seen):
    q, k, v = inputs(nq=80, n=80, kv=kv)
    call = Call(0.35, seen, True)
    before = operator(name)(q, k, v, call)[0]
    for cut in (10, 37, 79):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, cut:] += 3.0
        assert operator(name)(*changed, call)[0][:, :, :cut].equal(before[:, :, :cut])


@each
@pytest.mark.parametrize(("nq", "n", "wide"), [(1, 45, 8), (64, 33, 8), (20, 100, 12), (45, 45, 3)])
def test_any_lengths_and_widths(name, nq, n, wide):
    q, k, v = inputs(nq, n, kv=2, wide=wide)
    out, _ = operator(name)(q, k, v, Call(0.35))
    assert out.shape == (2, 4, nq, wide)
    assert torch.isfinite(out).all()


@each
def test_short_inputs_are_exact(name):
    q, k, v = inputs()
    call = Call(0.35, mask())
    expected = exact.attend(q, k, v, call)[0]
    torch.testing.assert_close(operator(name, min_length=100)(q, k, v, call)[0], expected)


@each
def test_few_queries_to_many_keys_are_exact(name):
    """Sorting the keys costs more than answering the queries."""
    q, k, v = inputs(nq=2, n=45)
    found = operator(name, min_length=20)(q, k, v, Call(0.35))[0]
    assert found.equal(exact.attend(q, k, v, Call(0.35))[0])


@each
def test_causal_attention_is_near_the_exact_one(name):
    """A chunk left out or counted twice would move all denominators of later rows the same way."""
    q, k, v = inputs(nq=80, n=80, kv=2)
    call = Call(0.1, mask(80), True)
    expected, total = exact.attend(q, k, v, call)
    found = [operator(name)(q, k, v, Call(0.1, mask(80), True, seed=seed)) for seed in range(6)]
    out, lse = (torch.stack(parts).mean(0) for parts in zip(*found, strict=True))
    alive = ~torch.isinf(total)
    assert (lse[alive] - total[alive]).mean().abs() < 0.1
    assert (out - expected).norm() / expected.norm() < 0.4


def error(name, **values):
    """Mean over seeds of the relative error on small logits."""
    q, k, v = inputs(n=32, nq=32)
    expected = exact.attend(q, k, v, Call(0.1))[0]
    found = [operator(name, **values)(q, k, v, Call(0.1, seed=seed))[0] for seed in range(4)]
    return float(torch.stack([(one - expected).norm() / expected.norm() for one in found]).mean())


@each
def test_settings_that_leave_nothing_out_are_exact(name):
    """An operator that has none says why, and comes the nearer the more it is given."""
    why = ATTENTION.info(FORMS.get(name, (name,))[0]).facts.get("never_exact")
    if why is not None:
        assert len(why) > 20
        assert 1e-5 < error(name, features=4096) < error(name, features=256) / 2 < error(name, features=16) / 4
        return
    q, k, v = inputs(n=32, nq=32)
    expected = exact.attend(q, k, v, Call(0.35))[0]
    nothing_out = {"bucket": 32, "landmarks": 32}
    for values in ({"leaf": 1} | nothing_out, {"leaf": 4, "near": 8} | nothing_out):
        torch.testing.assert_close(operator(name, **values)(q, k, v, Call(0.35))[0], expected, rtol=0, atol=1e-5)


@each
@pytest.mark.parametrize("causal", [False, True])
def test_large_logits_stay_finite(name, causal):
    q, k, v = inputs()
    out, _ = operator(name)(q * 60, k * 60, v, Call(0.35, causal=causal))
    assert torch.isfinite(out).all()


def test_a_key_that_dominates_is_found_at_large_logits():
    """With logits of +-1000, in operators that see all keys in some way; samples may miss it."""
    q, k, v = inputs(nq=64, n=64)
    k[:, :, 1:] = -k[:, :, :1]
    q = k[:, :, :1].expand_as(q) * 1000 / k[:, :, :1].square().sum(-1, keepdim=True)
    expected = v[:, :, :1].expand_as(v)
    torch.testing.assert_close(exact.attend(q, k, v, Call(1.0))[0], expected)
    torch.testing.assert_close(operator("cluster", leaf=4, near=2)(q, k, v, Call(1.0))[0], expected)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_single(name, dtype):
    q, k, v = inputs(dtype=dtype)
    out, _ = operator(name)(q, k, v, Call(0.35))
    assert out.dtype == dtype
    assert torch.isfinite(out).all()


@each
def test_same_seed_same_answer_and_no_global_draws(name):
    q, k, v = inputs()
    before = torch.get_rng_state()
    first, second = (operator(name)(q, k, v, Call(0.35, seed=3))[0] for _ in range(2))
    assert first.equal(second)
    assert torch.get_rng_state().equal(before)


@each
@pytest.mark.parametrize("causal", [False, True])
def test_gradient_of_values_matches_differences(name, causal):
    """Orders, weights and samples are constant in the gradient but depend on q and k; the goldens hold dq and dk."""
    n = 45 if causal else 20
    q, k, v = (x[:1, :2, :n].requires_grad_() for x in inputs(dtype=torch.float64))
    call = Call(0.35, causal=causal)
    upstream = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((operator(name)(q, k, v, call)[0] * upstream).sum(), (q, k, v))
    assert all(torch.isfinite(gradient).all() for gradient in found)
    if name.startswith("kdeformer"):
        return  # its samples depend on v, too
    step = torch.randn(v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 1e-6
    with torch.no_grad():
        ends = [(operator(name)(q, k, v + sign * step, call)[0] * upstream).sum() for sign in (1, -1)]
    torch.testing.assert_close((found[2] * step).sum(), (ends[0] - ends[1]) / 2, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("name", ["exact", "hyper", "kdeformer"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_queries_and_keys_match_differences(name, causal):
    """Codes of a hash change in jumps only, and samples are drawn evenly or by v: a small step moves neither."""
    n = 45 if causal else 20
    q, k, v = (x[:1, :2, :n].requires_grad_() for x in inputs(dtype=torch.float64))
    call = Call(0.35, causal=causal)
    generator = torch.Generator().manual_seed(3)
    upstream, step_q, step_k = (torch.randn(q.shape, dtype=torch.float64, generator=generator) for _ in range(3))
    found = torch.autograd.grad((operator(name)(q, k, v, call)[0] * upstream).sum(), (q, k))
    size = 1e-6
    with torch.no_grad():
        ends = [
            (operator(name)(q + sign * size * step_q, k + sign * size * step_k, v, call)[0] * upstream).sum()
            for sign in (1, -1)
        ]
    expected = (ends[0] - ends[1]) / (2 * size)
    torch.testing.assert_close((found[0] * step_q).sum() + (found[1] * step_k).sum(), expected, rtol=1e-5, atol=1e-8)


@each
@any_call
def test_without_the_kernel_the_same_comes_out(name, call, monkeypatch):
    """Other devices have no kernel that gives the log-sum-exp: there the logits are formed."""
    results = []
    for kernel in (True, False):
        monkeypatch.setattr(_flash, "_has_kernel", lambda _q, kernel=kernel: kernel)
        q, k, v = (x.requires_grad_() for x in inputs(kv=2))
        out, lse = operator(name)(q, k, v, call)
        results.append([out, lse.nan_to_num(neginf=-1e4), *torch.autograd.grad(out.sin().sum(), (q, k, v))])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=2e-5)
