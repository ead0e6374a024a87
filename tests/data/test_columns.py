import pyarrow as pa
import pytest

from kdtool.data.columns import column_kinds, resolve_roles
from kdtool.errors import DataProblem
from kdtool.sections import DataSection

MEDIA = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PAIR = (("text", "label"), ("text_pair",))


def roles(columns, wanted=PAIR, **data):
    schema = pa.schema(
        [(name, {"t": pa.string(), "n": pa.int64(), "m": MEDIA}[kind]) for name, kind in columns.items()]
    )
    return resolve_roles(column_kinds(schema), DataSection(**data), *wanted)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text": "t", "label": "n", "idx": "n"}, {"text": "text", "label": "label"}),
        ({"utterance": "t", "intent": "t"}, {"text": "utterance", "label": "intent"}),
        ({"Review": "t", "Category": "t"}, {"text": "Review", "label": "Category"}),
        ({"text": "t", "content": "t", "label": "n", "category": "t"}, {"text": "text", "label": "label"}),
        (
            {"sentence1": "t", "sentence2": "t", "label": "n"},
            {"text": "sentence1", "text_pair": "sentence2", "label": "label"},
        ),
        ({"text_a": "t", "text_b": "t", "label": "n"}, {"text": "text_a", "text_pair": "text_b", "label": "label"}),
        (
            {"premise": "t", "hypothesis": "t", "label": "n"},
            {"text": "premise", "text_pair": "hypothesis", "label": "label"},
        ),
        (
            {"question1": "t", "question2": "t", "label": "n"},
            {"text": "question1", "text_pair": "question2", "label": "label"},
        ),
        ({"body": "t", "label": "n"}, {"text": "body", "label": "label"}),
        ({"text": "t", "fine_label": "n"}, {"text": "text", "label": "fine_label"}),
    ],
)
def test_usual_names_are_guessed(columns, expected):
    assert roles(columns) == expected


def test_media_are_guessed():
    assert roles({"img": "m", "label": "n"}, (("image", "label"), ())) == {"label": "label", "image": "img"}
    assert roles({"clip": "m", "digit": "n"}, (("audio", "label"), ())) == {"label": "digit", "audio": "clip"}


def test_named_columns_win_and_optional_ones_may_be_absent():
    assert roles({"text": "t", "body": "t", "label": "n"}, text="body") == {"text": "body", "label": "label"}
    named = roles({"a": "t", "b": "t", "label": "n"}, text="a", text_pair="b")
    assert named == {"text": "a", "text_pair": "b", "label": "label"}
    assert roles({"text": "t"}, (("text",), ("label",))) == {"text": "text"}


@pytest.mark.parametrize(
    ("columns", "wanted", "message", "hint"),
    [
        (
            {"question": "t", "review": "t", "label": "n"},
            PAIR,
            "more than one column could be 'text'",
            "--set data.text=question",
        ),
        (
            {"text": "t", "fine_label": "n", "coarse_label": "n"},
            PAIR,
            "more than one column could be 'label'",
            "--set data.label=",
        ),
        ({"a": "t", "b": "t", "label": "n"}, PAIR, "more than one column could be 'text': a, b", "--set data.text=a"),
        ({"sentence1": "t", "sentence2": "t"}, (("text",), ()), "could be 'text'", "--set data.text="),
        ({"text": "t", "x": "n"}, PAIR, "no column looks like 'label'", "--set data.label=COLUMN"),
        ({"text": "t", "label": "n"}, (("text", "text_pair"), ()), "'text_pair'", "--set data.text_pair=COLUMN"),
    ],
)
def test_doubt_is_an_error_with_a_hint(columns, wanted, message, hint):
    with pytest.raises(DataProblem, match=message) as caught:
        roles(columns, wanted)
    assert hint in caught.value.hint
    assert caught.value.why.startswith("columns: ")


def test_an_unknown_named_column_gets_the_nearest():
    with pytest.raises(DataProblem, match=r"no column 'txet' \(data.text\)") as caught:
        roles({"text": "t", "label": "n"}, text="txet")
    assert "did you mean text?" in caught.value.hint
