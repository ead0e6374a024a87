"""Settings of a layer: the cheapest within the bound, and the length from which they are used."""

import pytest
import torch

from kdtool import patching
from kdtool.patching import choose as module
from kdtool.patching.capture import Captured, capture
from kdtool.patching.choose import Wish, candidates, choose, ladder, worst_head
from tests.patching.families import FAMILIES, build, noise, output


def seen(n=256, causal=False, window=None):
    captured = Captured(0.35, causal, window, n)
    for parts in captured.parts:
        parts.append(torch.randn(2, n, 8, generator=torch.Generator().manual_seed(len(parts) + 1)))
    return captured


def wish(**values):
    return Wish("cluster", **{"fixed": {"leaf": 1, "near": 0}, "max_error": 0.1, "lengths": [128, 256], **values})


def test_the_ladder_holds_what_was_asked_and_powers_of_two():
    assert ladder([300, 1000]) == [128, 256, 300, 512, 1000]


def test_fixed_settings_are_in_all_candidates():
    assert all(one["leaf"] == 8 for causal in (False, True) for one in candidates("cluster", {"leaf": 8}, causal))
    assert {"leaf": 64, "block": 64} in candidates("cluster", {}, True)
    assert {"bucket": 64, "samples": 64} in candidates("hyper", {}, False)


def test_settings_that_are_exact_at_these_lengths_are_no_choice():
    short = choose(0, "x", seen(causal=True), wish(min_length=64))
    assert "method.chunk makes them shorter" in short.layer.reason
    assert not short.trials
    fixed = {"leaf": 1, "near": 0, "chunk": 64}
    assert choose(0, "x", seen(causal=True), wish(min_length=64, fixed=fixed)).layer.method == "cluster"


def test_a_layer_within_the_bound_is_used_from_the_length_asked():
    choice = choose(3, "x", seen(), wish(min_length=100))
    assert (choice.layer.method, choice.layer.min_length, choice.layer.reason) == ("cluster", 100, None)
    assert max(choice.trials[-1].error.values()) < 1e-4
    assert choice.mean_error > 0.5


@pytest.mark.parametrize(
    ("ratios", "start"), [({128: 2.0, 256: 2.0}, 128), ({128: 1.0, 256: 2.0}, 256), ({128: 2.0, 256: 1.0}, None)]
)
def test_it_is_used_from_where_it_pays(monkeypatch, ratios, start):
    monkeypatch.setattr(module, "speed", lambda layer, q, *rest: ratios[q.shape[2]])
    layer = choose(0, "x", seen(), wish()).layer
    assert (layer.reason is None) == (start is not None)
    assert "times the speed" in layer.reason if start is None else layer.min_length == start


@pytest.mark.parametrize(
    ("captured", "values", "said"),
    [
        (seen(), {"fixed": {"leaf": 64, "near": 0}, "max_error": 1e-3, "min_length": 64}, "error"),
        (seen(), {"limit": 100, "min_length": 128}, "takes 100"),
        (seen(window=16), {}, "window of 16"),
        (seen(), {"max_error": 0.0}, "no error"),
        (seen(causal=True), {"fixed_state": True}, "cannot be fixed"),
    ],
)
def test_a_layer_stays_exact_with_a_reason(captured, values, said):
    layer = choose(0, "x", captured, wish(**values)).layer
    assert layer.method == "exact"
    assert said in layer.reason


def test_the_first_within_the_bound_is_taken_and_the_tries_are_kept():
    choice = choose(0, "x", seen(), wish(fixed={}, max_error=0.9, min_length=64))
    errors = [trial.error[256] for trial in choice.trials]
    assert all(error > 0.9 for error in errors[:-1])
    assert errors[-1] <= 0.9 or choice.layer.reason


def test_projections_are_fixed_where_that_is_asked():
    layer = choose(0, "x", seen(), wish(min_length=100, fixed_state=True)).layer
    assert {name: tuple(x.shape[:2]) for name, x in layer.state.items()} == dict.fromkeys(
        ("features", "query_features", "value_features"), (2, 8)
    )
    assert choose(0, "x", seen(), wish(min_length=100)).layer.state is None


def test_the_worst_head_counts():
    truth = noise(1, 2, 30, 4)
    found = truth.clone()
    found[:, 1] *= 1.5
    assert worst_head(found, truth) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "bart"])
def test_capture_joins_real_rows_without_padding(name):
    make, inputs = FAMILIES[name]
    model = build(make)
    sites = patching.find_sites(model, lambda: output(model, inputs()))
    found = capture(model, sites, [lambda: output(model, inputs())] * 3, 200)
    assert len(found) == len(sites)
    for one in found:
        q, k, _, call = one.at(200)
        assert q.shape[2] == k.shape[2] == 200
        assert call.causal == one.causal
    if name == "bert":
        assert found[0].parts[0][1].shape[1] == 68
