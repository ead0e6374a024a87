import json
import math
from pathlib import Path

import numpy as np
import pytest

from kdtool.errors import OutputProblem
from kdtool.proof import Proof, Result, Side, amount, retention
from kdtool.writing import jsonable, redact, write_text


def test_retention_follows_the_direction_of_the_metric():
    student = {"accuracy": 0.9, "nll": 0.5, "matthews": -0.1, "ece": 0.0, "f": 1.0, "auroc": math.nan}
    teacher = {"accuracy": 1.0, "nll": 0.4, "matthews": 0.5, "ece": 0.1, "auroc": 0.9}
    assert retention(student, teacher) == pytest.approx({"accuracy": 0.9, "nll": 0.8})


def test_json_has_the_documented_form(proof):
    result = Result("distill", Path("out/student"), proof, 1.23456, 30, {"next": "kdtool ...", "command": "other"})
    values = result.as_json()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["schema"] == 1
    assert (values["command"], values["output"], values["steps"]) == ("distill", "out/student", 30)
    assert values["model"] == {"parameters": 5_000_000, "bytes": 20_000_000}
    assert values["teacher"]["parameters"] == 20_000_000
    assert set(values["metrics"]) == {"student", "teacher", "retention"}
    assert values["metrics"]["student"]["accuracy"] == proof.student.metrics["accuracy"]
    assert values["gates"][1]["name"] == "accuracy.retention"
    assert not values["gates"][1]["passed"]
    assert values["latency"]["ratio"] == {"1": 4.0, "32": 4.0}
    assert values["next"] == "kdtool ..."


def test_json_without_a_proof_or_a_teacher(proof):
    empty = Result("export", None, None, 0.0).as_json()
    assert empty["model"] is None
    assert empty["metrics"] == {"student": {}, "teacher": {}, "retention": {}}
    alone = Result("evaluate", None, Proof(proof.student), 1.0)
    assert alone.as_json()["teacher"] is None
    assert alone.table[0] == ["metric", "model"]
    assert alone.gates_missed == []
    assert Result("export", None, None, 0.0).table == []
    assert Result("export", Path("out/onnx"), None, 0.0).lines == ["exported: out/onnx"]


def test_table_and_lines_say_how_it_compares(proof):
    result = Result("distill", Path("out/student"), proof, 1.0, 30, {"next": "kdtool export out/student"})
    header, *rows = result.table
    cells = {row[0]: row[1:] for row in rows}
    assert header == ["metric", "student", "teacher", "kept"]
    assert "\u00b1" in cells["accuracy"][0]
    assert cells["parameters"] == ["5 M", "20 M", "4.00x smaller"]
    assert cells["file size"] == ["20 MB", "80 MB", "4.00x smaller"]
    assert cells["latency, batch 1 (ms)"] == ["2.00 (p95 2.40)", "8.00 (p95 9.60)", "4.00x faster"]
    assert {len(row) for row in result.table} == {4}
    text = "\n".join(result.lines)
    assert "out/student (5 M parameters, 20 MB, 4.00x smaller, 4.00x faster at batch 1)" in text
    assert "% kept" in text
    assert result.lines[-1] == "next: kdtool export out/student"
    assert result.gates_missed == [str(proof.gates[1])]


def test_a_slower_and_larger_student_is_not_called_smaller(proof):
    swapped = Proof(proof.teacher, proof.student, {}, {1: 0.25})
    cells = {row[0]: row[-1] for row in Result("distill", None, swapped, 1.0).table}
    assert cells["file size"] == "4.00x larger"
    assert cells["latency, batch 1 (ms)"] == "4.00x slower"


def test_undefined_numbers_are_dashes_and_null():
    side = Side("m", None, 0, 0, {"nll": math.inf}, {}, {1: {"median_ms": math.nan}})
    result = Result("evaluate", None, Proof(side), 0.0)
    assert ["nll", "-"] in result.table
    assert result.as_json()["metrics"]["student"] == {"nll": None}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (12, "", "12"),
        (999_600, "", "1 M"),
        (999_000, "", "999 k"),
        (4_390_000, "", "4.39 M"),
        (7e9, "", "7 B"),
        (7e9, "B", "7 GB"),
    ],
)
def test_amounts(value, unit, text):
    assert amount(value, unit) == text


def test_jsonable_takes_what_runs_hold():
    values = {1: np.float32(0.5), "a": np.int64(3), "b": np.bool_(True), "c": np.array([1.0, np.nan]), "d": {2, 1}}
    assert jsonable(values) == {"1": 0.5, "a": 3, "b": True, "c": [1.0, None], "d": [1, 2]}
    assert jsonable([Path("a/b"), (1, math.inf)]) == ["a/b", [1, None]]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("x hf_abcdefgh12 y", "x [redacted] y"),
        ("--token secret -o out", "--token [redacted] -o out"),
        ("HF_TOKEN='a b' kdtool", "HF_TOKEN=[redacted] kdtool"),
        ("hf_short and hf-internal-testing", "hf_short and hf-internal-testing"),
    ],
)
def test_redaction(text, clean):
    assert redact(text) == clean


def test_writing_replaces_whole_files_and_explains_refusals(tmp_path):
    target = tmp_path / "deep" / "a.txt"
    write_text(target, "one")
    write_text(target, "two hf_abcdefgh12")
    assert target.read_text() == "two [redacted]"
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputProblem, match="cannot write"):
        write_text(tmp_path / "file" / "a.txt", "x")
