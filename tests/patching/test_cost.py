"""The paper's speed-ups are ratios of multiply-adds, and come out of our counter."""

import pytest
import torch

from kdtool.attention import cluster, exact, kdeformer
from kdtool.attention._base import Call
from kdtool.patching.cost import BIGGAN, T2T, Shape, exact_cost, kdeformer_cost, multiply_adds


def test_t2t_vit():
    assert round(exact_cost(T2T) / 1e9, 2) == 161.13
    assert round(kdeformer_cost(T2T, 32, 98) / 1e9, 2) == 8.80
    assert round(exact_cost(T2T) / kdeformer_cost(T2T, 32, 98), 2) == 18.31


def test_biggan():
    assert round(exact_cost(BIGGAN) / 1e9, 2) == 10.74
    assert round(kdeformer_cost(BIGGAN, 64, 128) / 1e9, 2) == 2.59
    assert round(exact_cost(BIGGAN) / kdeformer_cost(BIGGAN, 64, 128), 2) == 4.15


def drawn(n, width=64):
    return torch.randn(1, 1, n, width, generator=torch.Generator().manual_seed(0))


def test_what_runs_is_what_the_shapes_say():
    q = drawn(T2T.queries)
    config = kdeformer.Config(bucket=32, samples=98, min_length=0)
    found = multiply_adds(lambda: exact.attend(q, q, q, Call(0.125)))
    assert found == exact_cost(Shape(3136, 3136, 64, 64))
    run = multiply_adds(lambda: kdeformer.attend(q, q, q, Call(0.125), config))
    assert found / run == pytest.approx(18.31, rel=0.02)


def test_causal_attention_counts_half():
    q = drawn(256, 8)
    both = [multiply_adds(lambda c=causal: exact.attend(q, q, q, Call(0.3, causal=c))) for causal in (False, True)]
    assert both[0] == 2 * both[1]


def test_centroids_cost_less_than_their_keys():
    q = drawn(2048, 32)
    config = cluster.Config(leaf=32, block=64, min_length=0)
    assert multiply_adds(lambda: cluster.attend(q, q, q, Call(0.2), config)) < exact_cost(Shape(2048, 2048, 32, 32)) / 8
