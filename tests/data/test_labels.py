import numpy as np
import pytest

from kdtool.data.labels import match_labels
from kdtool.errors import DataProblem

DATA = ["negative", "positive"]


@pytest.mark.parametrize(
    "model",
    [None, ["LABEL_0", "LABEL_1"], ["negative", "positive"], ["Negative", "POSITIVE"]],
)
@pytest.mark.parametrize("how", ["refuse", "by-name"])
def test_identity(model, how):
    found = match_labels(DATA, model, how, "the teacher")
    assert found.dtype == np.int64
    assert found.tolist() == [0, 1]


def test_numbered_data_classes_are_ids():
    assert match_labels(["0", "1", "2"], ["a", "b", "c"], "refuse", "the teacher").tolist() == [0, 1, 2]


@pytest.mark.parametrize("data", [["0", "1", "2"], ["a", "b", "c"]])
def test_unnamed_classes_of_another_count_are_refused(data):
    with pytest.raises(DataProblem, match=r"the data has 3 classes, the teacher has 2"):
        match_labels(data, ["LABEL_0", "LABEL_1"], "by-name", "the teacher")


def test_another_order_is_refused_with_the_first_difference():
    with pytest.raises(DataProblem, match=r"class 0 is 'negative' in the data and 'positive' in the teacher") as caught:
        match_labels(DATA, ["positive", "negative"], "refuse", "the teacher")
    assert caught.value.hint == "--set data.label_map=by-name"


def test_more_model_classes_are_refused():
    with pytest.raises(DataProblem, match=r"2 classes, the teacher has 3"):
        match_labels(DATA, ["negative", "positive", "neutral"], "refuse", "the teacher")


def test_by_name_ignores_case_spaces_underscores_dashes():
    model = ["other", "Card-Arrival", "TOP UP"]
    assert match_labels(["top_up", "card arrival"], model, "by-name", "the teacher").tolist() == [2, 1]


def test_by_name_names_what_is_unmatched_and_the_nearest():
    with pytest.raises(DataProblem, match=r"class 'positiv' of the data is unknown to the teacher") as caught:
        match_labels(["negative", "positiv"], ["positive", "negative"], "by-name", "the teacher")
    assert "positive" in caught.value.hint


@pytest.mark.parametrize("side", ["data", "model"])
def test_by_name_refuses_names_that_cannot_be_told_apart(side):
    twins, plain = ["top up", "top_up"], ["other", "top_up"]
    data, model = (twins, plain) if side == "data" else (plain, twins)
    with pytest.raises(DataProblem, match="cannot be told apart"):
        match_labels(data, model, "by-name", "the teacher")


def test_explicit_mapping():
    mapping = {"negative": "bad", "positive": "good"}
    assert match_labels(DATA, ["good", "bad"], mapping, "the teacher").tolist() == [1, 0]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"negative": "bad"}, "class 'positive' of the data is missing from data.label_map"),
        ({"negative": "bad", "positive": "goood"}, "'goood', which is no class of the teacher"),
        ({"negativ": "bad", "positive": "good"}, "names 'negativ', which is no class of the data"),
    ],
)
def test_wrong_explicit_mapping(mapping, message):
    with pytest.raises(DataProblem, match=message) as caught:
        match_labels(DATA, ["good", "bad"], mapping, "the teacher")
    assert caught.value.hint
