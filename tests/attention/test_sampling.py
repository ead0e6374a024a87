"""Sampled attention: unbiased given the hash, with an error that falls like one over the root of the sample."""

import math

import pytest
import torch

from kdtool.attention import exact
from kdtool.attention._base import Call
from kdtool.registry import ATTENTION

SCALE = 0.35
each = pytest.mark.parametrize("name", ["kdeformer-paper", "kdeformer", "hyper"])


def attend(name, draws, n, seed=0, causal=False, **values):
    """Output and log-sum-exp of `draws` independent samples under one hash, and the exact ones, on Gaussian inputs."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, n, 8, generator=generator) for _ in range(3))
    config = ATTENTION.build_config(name, {"bucket": 16, "projections": 4, "min_length": 0} | values)
    many = [x.expand(draws, -1, -1, -1) for x in (q, k, v)]
    found = ATTENTION.get(name)(*many, Call(SCALE, causal=causal, seed=seed), config)
    return found, exact.attend(q, k, v, Call(SCALE, causal=causal))


def numerator(found):
    """exp(lse) [out, 1]: what the samples are summed to."""
    out, lse = found
    return torch.cat([out, torch.ones_like(out[..., :1])], -1).double() * lse.double().exp().unsqueeze(-1)


@each
@pytest.mark.parametrize(("causal", "bucket"), [(False, 16), (True, 4)])
def test_mean_of_2000_draws_is_the_exact_numerator(name, causal, bucket):
    found, expected = attend(name, 2000, 48, causal=causal, bucket=bucket, samples=8)
    draws, truth = numerator(found), numerator(expected)[0]
    spread = draws.std(0) / math.sqrt(len(draws))
    first = 4 * bucket if causal else 0  # the first chunk is exact
    torch.testing.assert_close(draws[:, :, :first].mean(0), truth[:, :first])
    spread, away = spread[:, first:], (draws.mean(0) - truth)[:, first:].abs()
    assert (spread > 0).all()
    assert (away / spread).max() < 4


@each
def test_error_falls_like_one_over_the_root_of_the_sample(name):
    sizes = (16, 32, 64, 128)
    errors = []
    for size in sizes:
        runs = [attend(name, 8, 1024, seed, samples=size) for seed in range(3)]
        errors.append(sum(float((found[0] - truth[0]).norm()) for found, truth in runs))
    x, y = (torch.tensor([math.log(value) for value in values]) for values in (sizes, errors))
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert -0.65 < slope < -0.35
