import hashlib
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from kdtool.errors import DataProblem, UsageProblem

TEXT_ONLY = (("text",), ())


def test_folder_with_all_splits(tmp_path, load, write, rows, listener):
    write(tmp_path / "train.jsonl.gz", rows)
    write(tmp_path / "dev.jsonl", rows[:6])
    path = write(tmp_path / "test.jsonl", rows[:4])
    (tmp_path / "labels.json").write_text('["bad", "good"]')
    data = load(tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 6, 4)
    assert data.labels == ["bad", "good"]
    assert data.train[3] == {"text": "text 3", "label": 1}
    assert data.train.columns["label"].dtype == "int64"
    assert listener.lines == ["columns: text=text, label=label"]
    record = data.provenance["splits"]["test"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert record == {"split": "test", "rows": 4, "rows_read": 4, "sha256": {"test.jsonl": digest}}
    json.dumps(data.provenance)


def test_sharded_parquet_in_a_data_folder(tmp_path, load, rows):
    (tmp_path / "data").mkdir()
    for part in range(3):
        table = pa.Table.from_pylist(rows[part::3])
        pa.parquet.write_table(table, tmp_path / "data" / f"train-{part:05d}-of-00003.parquet")
    data = load(tmp_path)
    assert len(data.train) + len(data.test) == 20
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataProblem, match=r"part 00001 of 00003 is missing"):
        load(tmp_path)


def test_single_file_is_cut_and_says_so(tmp_path, load, write, rows, listener):
    path = write(tmp_path / "mine.jsonl", rows)
    data = load(path, holdout=0.2)
    assert (len(data.train), data.validation, len(data.test)) == (16, None, 4)
    assert not set(data.train.columns["text"]) & set(data.test.columns["text"])
    assert "test: 4 rows held out of split 'train' (seed 0)" in listener.lines
    assert load(path, holdout=0.2).test.columns["text"] == data.test.columns["text"]
    assert load(path, holdout=0.2, seed=5).test.columns["text"] != data.test.columns["text"]
    scored = load(path, score_only=True)
    assert scored.train is None
    assert len(scored.test) == 20


def test_pairs_and_csv_classes(tmp_path, load):
    body = "".join(f"a{i},b{i},{'yes' if i % 2 else 'no'}\n" for i in range(10))
    (tmp_path / "train.csv").write_text("premise,hypothesis,label\n" + body)
    (tmp_path / "test.csv").write_text("premise,hypothesis,label\nx,y,yes\n")
    data = load(tmp_path)
    assert data.labels == ["no", "yes"]
    assert data.test[0] == {"text": "x", "text_pair": "y", "label": 1}


@pytest.mark.parametrize(
    ("labels", "expected", "ids"),
    [
        (["0", "1", "2.0"], ["0", "1", "2"], [0, 1, 2]),
        (["1", "2", "10"], ["1", "2", "10"], [0, 1, 2]),
        (["0", "3", "3"], ["0", "1", "2", "3"], [0, 3, 3]),
        (["b", "a", "1"], ["1", "a", "b"], [2, 1, 0]),
    ],
)
def test_csv_labels_of_all_kinds(tmp_path, load, labels, expected, ids):
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"t,{label}\n" for label in labels))
    (tmp_path / "test.csv").write_text(f"text,label\nt,{labels[0]}\n")
    data = load(tmp_path)
    assert data.labels == expected
    assert data.train.columns["label"].tolist() == ids


def test_class_names_configuration_before_file(tmp_path, load, write, rows):
    write(tmp_path / "train.jsonl", rows)
    (tmp_path / "labels.json").write_text('["a", "b"]')
    assert load(tmp_path).labels == ["a", "b"]
    assert load(tmp_path, labels=["x", "y", "z"]).labels == ["x", "y", "z"]
    with pytest.raises(DataProblem, match=r"class 'x' is there twice in data\.labels"):
        load(tmp_path, labels=["x", "x"])


def test_named_strings_follow_the_order_of_the_class_list(tmp_path, load, write):
    write(tmp_path / "train.jsonl", [{"text": "t", "label": name} for name in ("yes", "no", "yes", "no")])
    assert load(tmp_path, labels=["yes", "no"], score_only=True).test.columns["label"].tolist() == [0, 1, 0, 1]


def test_limits_are_seeded_choices(tmp_path, load, write, rows):
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", rows)
    data = load(tmp_path, limit=8, test_limit=3)
    assert (len(data.train), len(data.test)) == (8, 3)
    assert data.provenance["splits"]["train"]["rows"] == 8
    assert data.provenance["splits"]["train"]["rows_read"] == 20
    assert load(tmp_path, limit=8).train.columns["text"] == data.train.columns["text"]
    assert load(tmp_path, limit=8, seed=1).train.columns["text"] != data.train.columns["text"]


def test_one_split_by_hash(tmp_path, load, write, rows):
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "other.jsonl", rows[:5])
    data = load(f"{tmp_path}#other", score_only=True)
    assert len(data.test) == 5
    with pytest.raises(DataProblem, match="no split 'othr'") as caught:
        load(f"{tmp_path}#othr")
    assert "other" in caught.value.hint


def test_shipped_sets(load):
    data = load("banking77", optional=())
    assert (len(data.train), len(data.test), len(data.labels)) == (10003, 3080, 77)
    assert data.labels[data.train[0]["label"]] == "card_arrival"
    stories = load("tinystories", *TEXT_ONLY)
    assert (len(stories.train), stories.validation, len(stories.test), stories.labels) == (1000, None, 97, None)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            [{"text": "a", "label": None}] * 2,
            r"2 of 22 labels are missing in column 'label' of split 'train' \(first: row 21\)",
        ),
        ([{"text": "a", "label": 1.5}], r"no classes: 1.5 in split 'train', row 21"),
        (
            [{"text": None, "label": 1}],
            r"1 of 21 texts are missing in column 'text' of split 'train' \(first: row 21\)",
        ),
        ([{"text": "a", "label": -1}], r"label -1 is no class id"),
        ([{"text": "a", "label": 50000}], r"look like measurements"),
    ],
)
def test_bad_rows_are_counted_and_named(tmp_path, load, write, rows, bad, message):
    write(tmp_path / "train.jsonl", [*rows, *bad])
    write(tmp_path / "test.jsonl", rows)
    with pytest.raises(DataProblem, match=message) as caught:
        load(tmp_path)
    assert caught.value.hint


def test_missing_label_in_csv_and_nan(tmp_path, load):
    (tmp_path / "a.csv").write_text("text,label\na,0\nb,\n")
    with pytest.raises(DataProblem, match=r"1 of 2 labels are missing"):
        load(tmp_path / "a.csv")
    pa.parquet.write_table(pa.table({"text": ["a", "b"], "label": [0.0, float("nan")]}), tmp_path / "a.parquet")
    with pytest.raises(DataProblem, match=r"first: row 2"):
        load(tmp_path / "a.parquet")


def test_unknown_test_label_and_hidden_labels(tmp_path, load, write):
    write(tmp_path / "train.jsonl", [{"text": "t", "label": name} for name in ("card", "cash", "card")])
    write(tmp_path / "test.jsonl", [{"text": "t", "label": "card"}, {"text": "t", "label": "csh"}])
    with pytest.raises(DataProblem, match=r"label 'csh' in split 'test' \(row 2\) is none of the 2 classes") as caught:
        load(tmp_path)
    assert "cash" in caught.value.hint
    write(tmp_path / "train.jsonl", [{"text": "t", "label": i} for i in (0, 1)])
    write(tmp_path / "test.jsonl", [{"text": "t", "label": -1}])
    for names in (None, ["no", "yes"]):
        with pytest.raises(DataProblem, match="-1") as caught:
            load(tmp_path, labels=names)
        assert "data.test_split=validation" in caught.value.hint


def test_label_id_out_of_range(tmp_path, load, write, rows):
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", [{"text": "t", "label": 2}])
    with pytest.raises(DataProblem, match=r"label id 2 in split 'test' \(row 1\) is out of range: there are 2 classes"):
        load(tmp_path, labels=["a", "b"])


def test_one_class_in_training(tmp_path, load, write, rows):
    write(tmp_path / "train.jsonl", [{"text": "t", "label": 0}] * 3)
    write(tmp_path / "test.jsonl", rows)
    with pytest.raises(DataProblem, match="all 3 training rows have the class 'a'"):
        load(tmp_path, labels=["a", "b"])
    assert load(tmp_path, ("text",), ("label",), labels=["a", "b"]).train is not None


def test_text_that_is_none(tmp_path, load, write):
    write(tmp_path / "train.jsonl", [{"text": 5, "label": 0}, {"text": 6, "label": 1}])
    with pytest.raises(DataProblem, match="holds int64, not text") as caught:
        load(tmp_path)
    assert "--set data.text=COLUMN" in caught.value.hint


def test_unknown_column_and_split(tmp_path, load, write, rows):
    write(tmp_path / "train.jsonl", rows)
    with pytest.raises(DataProblem, match="no column 'txt'"):
        load(tmp_path, text="txt")
    with pytest.raises(DataProblem, match="no split 'tests'"):
        load(tmp_path, test_split="tests")


@pytest.mark.parametrize("name", ["train.jsonll", "./missing", "deep/er/missing", "train.csv"])
def test_missing_paths_get_the_nearest_name(tmp_path, load, write, rows, monkeypatch, name):
    write(tmp_path / "train.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataProblem, match="does not exist") as caught:
        load(tmp_path / name if name == "train.jsonll" else name)
    assert "train.jsonl" in caught.value.hint


def test_sources_that_are_no_data(tmp_path, load, write, rows):
    with pytest.raises(DataProblem, match="holds no data files"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataProblem, match="is no data file"):
        load(tmp_path / "notes.txt")
    with pytest.raises(UsageProblem, match="no data given") as caught:
        load("")
    assert "banking77" in caught.value.hint
    with pytest.raises(DataProblem, match="neither a path nor a Hub id"):
        load("what is this")


def test_ambiguous_folder_and_bad_class_list(tmp_path, load, write, rows):
    write(tmp_path / "train.jsonl", rows)
    for content, message in (
        ("{", "cannot be read"),
        ('{"a": 1}', "not a list of class names"),
        ("[]", "names no classes"),
    ):
        (tmp_path / "labels.json").write_text(content)
        with pytest.raises(DataProblem, match=message):
            load(tmp_path)
    (tmp_path / "labels.json").unlink()
    write(tmp_path / "data" / "train.jsonl", rows)
    with pytest.raises(DataProblem, match=r"'train' in .* is there more than once"):
        load(tmp_path)
