"""Every example runs, at a tiny size."""

import json
import os
import runpy
import shlex
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import run_here

FOLDER = Path(__file__).parent.parent / "examples"
TINY = {"STEPS": "2", "TEST_ROWS": "4"}


def run(command: list[str], cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    values = os.environ | {"OMP_NUM_THREADS": "1", "CI": "1", "HF_HUB_OFFLINE": "1"} | environment
    values["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{values['PATH']}"
    return subprocess.run(command, env=values, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.fixture
def script(monkeypatch, capsys):
    """`script(NAME, WORD, ...)`: runs an example in this process, and gives what it printed."""

    def call(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_all_examples_are_tested():
    assert {path.name for path in FOLDER.iterdir() if path.is_file()} == {
        "compare_with_control.py",
        "distil_language_model.py",
        "gate.sh",
    }


def test_distil_language_model(tmp_path, script):
    student = tmp_path / "student"
    said = script("distil_language_model.py", "--output", student, "--steps", 2, "--test-rows", 4)
    assert "token-accuracy" in said
    assert "Once upon a time" in said
    assert (student / "model.safetensors").is_file()


def test_compare_with_control(tmp_path, script):
    said = script("compare_with_control.py", "--output", tmp_path / "out", "--steps", 2, "--test-rows", 4, "--seeds", 0)
    assert "the teacher is worth" in said
    assert set(json.loads((tmp_path / "out" / "comparison.json").read_text())["methods"]) == {"none", "kd"}


def test_gate(tmp_path):
    done = run(["bash", str(FOLDER / "gate.sh"), str(tmp_path / "out")], KEEP="0.99", **TINY)
    assert done.returncode == 3, done.stderr
    assert "too little of its teacher" in done.stdout
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [gate["passed"] for gate in result["gates"]] == [False]
    assert (tmp_path / "out" / "student" / "report.md").is_file()


@pytest.mark.parametrize(
    ("code", "said"), [(0, "passed"), (3, "too little of its teacher"), (5, "failed with exit code 5")]
)
def test_gate_ends_as_kdtool_does(tmp_path, code, said):
    """With a `kdtool` that notes its words and does nothing."""
    program = tmp_path / "kdtool"
    program.write_text(f'#!/bin/sh\necho "$@"\nexit {code}\n')
    program.chmod(0o755)
    words = 'PATH="$1:$PATH" exec bash "$2" "$3"'
    gate = ["bash", "-c", words, "-", str(tmp_path), str(FOLDER / "gate.sh"), str(tmp_path / "out")]
    done = run(gate, KEEP="0.42", **TINY)
    assert done.returncode == code
    assert said in done.stdout
    assert "--fail-under token-accuracy.retention=0.42" in (tmp_path / "out" / "result.json").read_text()


def test_workflow_names_options_that_exist(tmp_path):
    text = (FOLDER / "ci" / "kdtool.yml").read_text()
    steps = yaml.safe_load(text)["jobs"]["distil"]["steps"]
    commands = [step["run"] for step in steps if "run" in step and step["run"].startswith("kdtool")]
    assert len(commands) == 2
    values = {"TEACHER": "owner/teacher@main", "DATA": "owner/data@main", "STUDENT": "owner/student"}
    for command in commands:
        words = shlex.split(
            string.Template(command.split(">")[0].replace('--push "$STUDENT" --private', "")).substitute(values)
        )
        # offline, of models that no cache holds, a command that parses ends with exit code 4, one that does not with 2
        done = run_here(*words[1:], "--offline", folder=tmp_path)
        assert done.returncode == 4, done.stderr
