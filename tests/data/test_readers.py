import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from kdtool.data.readers import file_sha256, read_table
from kdtool.errors import DataProblem

ROWS = [{"text": "one", "label": 0}, {"text": "two, and\nmore", "label": 1}, {"text": 'say "three"', "label": None}]


def encoded(suffix):
    quoted = 'text{0}label\none{0}0\n"two, and\nmore"{0}1\n"say ""three"""{0}\n'
    kind = suffix.removesuffix(".gz")
    text = {
        ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS) + "\n",
        ".json": json.dumps(ROWS, indent=1),
        ".csv": quoted.format(","),
        ".tsv": quoted.format("\t"),
    }[kind]
    return gzip.compress(text.encode(), mtime=0) if suffix.endswith(".gz") else text.encode()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz"])
def test_formats_give_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"train{suffix}"
    path.write_bytes(encoded(suffix))
    table = read_table(path)
    assert table.column("text").to_pylist() == [row["text"] for row in ROWS]
    untyped = suffix.startswith((".csv", ".tsv"))
    assert table.column("label").to_pylist() == (["0", "1", None] if untyped else [0, 1, None])


def test_parquet_and_json_lines_under_the_name_json(tmp_path):
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet").to_pylist() == ROWS
    (tmp_path / "a.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read_table(tmp_path / "a.json").to_pylist() == ROWS


def test_rows_that_arrow_does_not_take_are_read_slowly(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"label": 1, "score": 2}\n{"label": 12345678901234567890, "score": 2.5}\n')
    assert read_table(path).column("score").to_pylist() == [2.0, 2.5]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n[1]\n', r"a\.jsonl, line 3: not an object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', r"row 2: column 'text' holds 5, before that text"),
        ("a.jsonl", b'{"a": 1}\n{"a": true}\n', r"row 2: column 'a' holds True, before that numbers"),
        ("a.json", b'[{"text": "a"},\n {"text"}]', r"a\.json, line 2: not valid JSON"),
        ("a.json", b'[{"text": "a"}, 5]', r"entry 2: not an object"),
        ("a.json", b"[]", r"a\.json holds no rows"),
        ("a.jsonl", b"\n\n", r"a\.jsonl holds no rows"),
        ("a.jsonl", b"", r"a\.jsonl is empty"),
        ("a.csv", b"", r"a\.csv is empty"),
        ("a.csv", b"text,label\n", r"a\.csv holds no rows"),
        ("a.csv", b"text,label\na,1\nb,2,3\n", r"a\.csv cannot be read as csv"),
        ("a.csv", b"text,text\na,1\n", r"more than one column 'text'"),
        ("a.csv", b"text\n\xff\xfe\n", r"a\.csv cannot be read as csv"),
        ("a.parquet", b"not parquet at all", r"a\.parquet cannot be read as parquet"),
        ("a.jsonl.gz", b'{"text": "a"}\n', r"a\.jsonl\.gz cannot be read as jsonl"),
        ("a.csv.gz", gzip.compress(b"text\n" + b"abc\n" * 999, mtime=0)[:-20], r"a\.csv\.gz cannot be read as csv"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-20], r"a\.jsonl\.gz cannot be read as jsonl"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl cannot be read as jsonl"),
    ],
)
def test_broken_files_are_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataProblem, match=message) as caught:
        read_table(tmp_path / name)
    assert "\n" not in caught.value.message


def test_csv_row_of_the_error_is_given(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,1\nb,2,3\n")
    with pytest.raises(DataProblem) as caught:
        read_table(tmp_path / "a.csv")
    assert "Expected 2 columns, got 3" in caught.value.why


def test_file_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")
