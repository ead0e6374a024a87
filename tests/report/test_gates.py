import subprocess
import sys

import pytest

from kdtool.errors import UsageProblem
from kdtool.gates import Gate, check, higher_is_better, parse_gates


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
