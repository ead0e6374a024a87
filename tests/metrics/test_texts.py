"""Metrics of generated texts and agreement of two models."""

import numpy as np
import pytest

from kdtool.errors import UsageProblem
from kdtool.metrics import Texts, agreement, compared, score_texts
from kdtool.metrics._texts import library
from kdtool.metrics.exact_answer import RULES, agrees
from kdtool.registry import METRICS

NAMES = [name for name in METRICS.names() if compared(name) == "texts"]
TEXTS = Texts(
    ["the cat sat on the mat today", "a dog ran", "so 3 + 4 is 7"], ["the cat sat on a mat", "a cat ran off", "it is 7"]
)


@pytest.mark.parametrize(
    ("prediction", "reference", "rule", "right"),
    [
        ("He has 3 + 4 = 7 apples.", "3+4=7\n#### 7", "number", True),
        ("so 1,234.0 in all", "#### 1234", "number", True),
        ("#### 12 and then 13", "#### 12", "number", True),
        ("it is 12 --> 12", "12", "number", True),
        ("12 or 13", "12", "number", False),
        ("no idea", "12", "number", False),
        ("", "12", "number", False),
        ("-3.50", "-3.5", "number", True),
        ("18.0", "a chain --> 18", "gsm8k", False),
        ("18", "a chain --> 18", "gsm8k", True),
        ('so the letters are n, k. --> "nk"', "we join --> NK", "last_letter_concatenation", True),
        ("--> kn", "nk", "last_letter_concatenation", False),
        ("So it can. --> Yes", "yes", "strategy_qa", True),
        ("a  b\n", "a b", "text", True),
        ("a b.", "a b", "text", False),
    ],
)
def test_answers(prediction, reference, rule, right):
    assert agrees(prediction, reference, rule) == right


def test_every_rule_takes_any_text():
    for rule in RULES:
        for text in ("", "-->", "#### ", "x --> 1", "\n"):
            assert isinstance(agrees(text, "chain --> A 5 yes", rule), bool)


def test_every_metric_of_texts_has_a_value_in_bounds_and_an_error():
    values, errors = score_texts(NAMES, TEXTS)
    assert set(NAMES) >= {"bleu", "chrf", "exact-answer", "rouge-1", "rouge-2", "rouge-l"}
    for name in NAMES:
        low, high = METRICS.info(name).facts["bounds"]
        assert low <= values[name] <= high
        assert errors[name] > 0
        assert METRICS.get(name)(TEXTS) == values[name]
        whole = METRICS.get(name)(Texts(TEXTS.references, TEXTS.references))
        assert whole == pytest.approx(1.0 if name == "exact-answer" else high), name
    assert values["exact-answer"] == pytest.approx(1 / 3)


def test_rouge_by_hand():
    texts = Texts(["The cat sat"], ["the cat on mat"])
    assert METRICS.get("rouge-1")(texts) == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert METRICS.get("rouge-2")(texts) == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))


def test_agreement_counts_units_and_its_error_takes_rows_as_independent():
    student, teacher = np.array([1, 2, 3, 4, 5]), np.array([1, 2, 9, 4, 9])
    value, error = agreement.measured(student, teacher, np.array([2, 0, 3]))
    assert value == agreement.compute(student, teacher) == pytest.approx(0.6)
    sums, units = np.array([2, 0, 1]), np.array([2, 0, 3])
    assert error == pytest.approx(np.sqrt(3 / 2 * np.square(sums - 0.6 * units).sum()) / 5)
    assert agreement.measured(student, teacher, np.array([2, 3, 0]))[0] == pytest.approx(0.6)


def test_a_missing_library_is_one_line():
    with pytest.raises(UsageProblem, match="metric bleu needs kdtool_no_such") as caught:
        library("kdtool_no_such", "bleu")
    assert "kdtool[eval]" in caught.value.hint
