"""The paper's speed-ups are ratios of multiply-adds, and come out of our counter."""

from kdtool.patching.cost import BIGGAN, T2T, exact_cost, kdeformer_cost


def test_t2t_vit():
    assert round(exact_cost(T2T) / 1e9, 2) == 161.13
    assert round(kdeformer_cost(T2T, 32, 98) / 1e9, 2) == 8.80
    assert round(exact_cost(T2T) / kdeformer_cost(T2T, 32, 98), 2) == 18.31


def test_biggan():
    assert round(exact_cost(BIGGAN) / 1e9, 2) == 10.74
    assert round(kdeformer_cost(BIGGAN, 64, 128) / 1e9, 2) == 2.59
    assert round(exact_cost(BIGGAN) / kdeformer_cost(BIGGAN, 64, 128), 2) == 4.15
