import math
import subprocess
import sys

import pytest

from kdtool.errors import UsageProblem
from kdtool.gates import Gate, check, check_drops, higher_is_better, parse_drops, parse_gates


def test_both_forms_are_read():
    assert parse_gates(["accuracy=0.85", "macro_f1.retention = 0.97", "loss=1e-1"]) == [
        Gate("accuracy", "value", 0.85),
        Gate("macro_f1", "retention", 0.97),
        Gate("loss", "value", 0.1),
    ]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("acuracy=0.8", "did you mean accuracy"),
        ("accuracy", "such as"),
        ("=0.8", "such as"),
        ("accuracy=high", "such as"),
        ("accuracy=nan", "such as"),
        ("accuracy=85", "accuracy=0.85"),
        ("accuracy.retained=0.9", "accuracy.retention=0.9"),
    ],
)
def test_mistakes_get_a_hint(item, words):
    with pytest.raises(UsageProblem) as caught:
        parse_gates([item])
    assert item in caught.value.message
    assert words in caught.value.hint


def test_further_metrics_of_a_run_are_known():
    assert parse_gates(["word_error=0.2"], also=["word-error"])[0].upper


@pytest.mark.parametrize("name", ["ece", "nll", "brier", "loss", "perplexity", "latency", "latency_ms", "eer"])
def test_lower_is_better(name):
    assert not higher_is_better(name)


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "matthews", "auroc", "bleu", "token-accuracy"])
def test_higher_is_better(name):
    assert higher_is_better(name)


def test_bounds_are_met_from_the_right_side():
    student, teacher = {"accuracy": 0.85, "ece": 0.06}, {"accuracy": 0.9, "ece": 0.03}
    kept = {"accuracy": 0.944, "ece": 0.5}
    gates = parse_gates(["accuracy=0.85", "ece=0.05", "accuracy.retention=0.95", "ece.retention=0.5"])
    results = [check(gate, student, teacher, kept) for gate in gates]
    assert [result.passed for result in results] == [True, False, False, True]
    assert str(results[1]) == "ece 0.06 > 0.05"
    assert str(results[2]) == "accuracy.retention 0.944 < 0.95"


def test_undefined_values_miss():
    (gate,) = parse_gates(["ece.retention=0.5"])
    result = check(gate, {"ece": 0.0}, {"ece": 0.1}, {})
    assert not result.passed
    assert "undefined" in str(result)


def test_absent_metrics_and_teachers_are_named():
    absolute, relative = parse_gates(["auroc=0.5", "accuracy.retention=0.5"])
    with pytest.raises(UsageProblem) as caught:
        check(absolute, {"accuracy": 1.0}, {}, {})
    assert "accuracy" in caught.value.why
    with pytest.raises(UsageProblem, match="the run has none"):
        check(relative, {"accuracy": 1.0}, None, {})


def test_no_heavy_import():
    code = (
        "import sys; from kdtool.gates import parse_gates; parse_gates(['ece=0.1'])\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("item", "after", "before", "drop", "passed"),
    [
        ("accuracy=0.005", {"accuracy": 0.9}, {"accuracy": 0.905}, 0.005, True),
        ("accuracy=0.005", {"accuracy": 0.89}, {"accuracy": 0.905}, 0.015, False),
        ("loss=0.1", {"loss": 1.3}, {"loss": 1.0}, 0.3, False),
        ("macro_f1=0", {"macro-f1": 0.8}, {"macro-f1": 0.7}, -0.1, True),
        ("accuracy=0.1", {"accuracy": math.nan}, {"accuracy": 0.7}, math.nan, False),
    ],
)
def test_drops_bound_how_much_worse_a_metric_may_become(item, after, before, drop, passed):
    (result,) = check_drops([item], after, before)
    assert result.value == pytest.approx(drop, nan_ok=True)
    assert result.passed is passed
    assert result.upper


@pytest.mark.parametrize("item", ["accuracy", "=1", "acuracy=0.1", "accuracy=x", "accuracy=-1", "accuracy=nan"])
def test_wrong_drops_are_refused(item):
    with pytest.raises(UsageProblem, match="--max-drop"):
        parse_drops([item])


def test_a_drop_of_what_was_not_measured_is_refused():
    with pytest.raises(UsageProblem, match="does not measure"):
        check_drops(["accuracy=0.1"], {"nll": 1.0}, {"nll": 1.0})
