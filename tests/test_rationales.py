"""Rationales: filter, deduplication, prompts."""

from kdtool.rationales import Rationale, correct, prompts, split, usable


def test_only_right_rows_are_kept_each_once():
    rows = [
        Rationale("Q1", "so two", "2"),
        Rationale("Q1", "So  two", "2"),
        Rationale("Q1", "planted", "2", initial_correct=False),
        Rationale("Q2", "so two", "2"),
    ]
    assert usable(rows) == [rows[0], rows[3]]
    assert usable(rows, distinct=False) == [rows[0], rows[1], rows[3]]


def test_numeric_comparison_leaves_words_alone():
    assert not correct("nothing", "18", "gsm8k", numeric=True)
    assert split("a --> b --> c") == ("a", " b --> c")


def test_prompts():
    assert prompts(" How many? ") == "Q: How many?\nA: Let's think step by step."
    assert prompts("How many?", "Two. ").endswith("step by step. Two.\nTherefore, the answer is")
