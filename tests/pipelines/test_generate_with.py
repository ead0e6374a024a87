"""Texts of a local teacher that a `vllm` process writes: what it is started with and asked, and that it ends."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import transformers

from tests import chains
from tests.pipelines.conftest import QUICK

ROOT = Path(__file__).parents[2]
FEW = ["--max-steps", "2", "--batch-size", "4", "--set", "eval.answers=svamp", "--set", "eval.max_new_tokens=8", *QUICK]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    for seed, name in enumerate(("teacher", "mentor", "student")):
        chains.speller(root / name, seed=seed)
    chains.data(root / "data", count=4)
    return root


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """A program of that name on PATH; `vllm()` gives what it noted of each start, and `vllm(HOW)` sets how it goes."""
    program, notes = tmp_path / "bin" / "vllm", tmp_path / "notes"
    for folder in (program.parent, notes):
        folder.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m tests.endpoint.vllm "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_VLLM_NOTES", str(notes))
    monkeypatch.setenv("FAKE_VLLM", "serves")
    monkeypatch.setenv("KDTOOL_VLLM_START", "60")

    def call(how=None):
        if how is not None:
            monkeypatch.setenv("FAKE_VLLM", how)
        return [json.loads(path.read_text()) for path in sorted(notes.glob("*.json"))]

    return call


def command(place, *more, method="seqkd", teacher=None, out="out"):
    given = ["distill", teacher or place / "teacher", "--student", place / "student", "--method", method]
    return [*given, "--data", place / "data", "--generate-with", "vllm", "-o", out, *more, *FEW]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def runs(pid):
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_seqkd_learns_what_vllm_writes_from_the_tokens_of_training(place, cli, vllm, tmp_path):
    found = cli(*command(place, "--set", "method.max_new_tokens=64"))
    assert found.code == 0, found.err
    (note,) = vllm()
    assert not runs(note["pid"])
    words = note["words"]
    assert words[:2] == ["serve", str(place / "teacher")]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert (options["--host"], options["--dtype"], options["--generation-config"]) == ("127.0.0.1", "float32", "vllm")
    assert int(options["--max-model-len"]) <= 256
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "teacher")
    texts = [f"{row['question']}\n" for row in chains.sums(4)]
    assert sorted(note["asked"]) == sorted([1, *tokenizer(text)["input_ids"]] for text in texts)
    rows = lines(tmp_path / "out" / "data" / "responses.jsonl")
    assert [row["response"] for row in rows] == [
        f"Count on to {row['answer']}, way 0. --> {row['answer']}" for row in chains.sums(4)
    ]
    assert {row["provenance"]["written_by"] for row in rows} == {"vllm"}
    assert all(row["provenance"]["model"] == str(place / "teacher") for row in rows)
    assert all(len(row["provenance"]["weights"]) == 64 for row in rows)
    manifest = json.loads((tmp_path / "out" / "kdtool.json").read_text())
    assert manifest["config"]["teacher"]["generate_with"] == "vllm"
    assert manifest["metrics"]["teacher"], "the teacher is in memory for the report"
    assert "INFO serving" in (tmp_path / "out" / "data" / "vllm.log").read_text()


def test_teacher_and_mentor_are_served_in_turn(place, cli, vllm, tmp_path):
    values = {"mentor": place / "mentor", "mentor_epochs": 1, "n_teacher": 2, "n_aug": 1, "max_new_tokens": 40}
    settings = [word for name, value in values.items() for word in ("--set", f"method.{name}={value}")]
    found = cli(*command(place, *settings, method="mentor-kd"))
    assert found.code == 0, found.err
    teacher, mentor = vllm()
    assert teacher["words"][1] == str(place / "teacher")
    assert mentor["words"][1].endswith("models/mentor")  # as trained, not as it came
    assert len(teacher["asked"]) == 4 * 2 + 4 * 2  # chains, two to a question, then an answer to each, of one server
    assert len(mentor["asked"]) == 4
    assert not runs(teacher["pid"])
    assert not runs(mentor["pid"])
    rows = lines(tmp_path / "out" / "data" / "train.jsonl")
    assert {row["source"] for row in rows} == {"teacher", "mentor"}
    assert all(row["provenance"]["written_by"] == "vllm" for row in rows)


def test_what_goes_wrong_is_said_and_what_was_written_kept(place, cli, vllm, tmp_path, monkeypatch):
    vllm("fails")
    found = cli(*command(place))
    assert found.code == 4, found.err
    assert found.problem == "vllm ended with 3 before it answered"
    assert "ValueError: no device was found" in found.err
    log = tmp_path / "out" / ".kdtool" / "kept" / "data" / "vllm.log"
    assert str(log.relative_to(tmp_path)) in found.err
    assert "INFO reading the model" in log.read_text()
    monkeypatch.setattr("kdtool.endpoint.client.TRIES_UNREACHABLE", 1)
    monkeypatch.setattr("kdtool.endpoint.client.TRIES", 1)
    vllm("dies")
    found = cli(*command(place))
    assert found.code == 4, found.err
    assert found.problem == "vllm ended with 1 while it wrote"
    assert "engine core died" in found.err
    kept = len(lines(log.with_name("responses.jsonl.part")))
    vllm("serves")
    found = cli(*command(place))
    assert found.code == 0, found.err
    assert len(vllm()[-1]["asked"]) == 4 - kept
    assert not any(runs(note["pid"]) for note in vllm())


def test_ctrl_c_ends_it(place, cli, vllm):
    vllm("silent")
    alive = []

    def press():
        while not vllm():
            time.sleep(0.05)
        alive.append(runs(vllm()[0]["pid"]))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    assert cli(*command(place)).code == 130
    (note,) = vllm()
    assert alive == [True]
    assert not runs(note["pid"])


MISTAKES = {
    "weights that change": ("skd", None, [], "skd has no texts written before it trains"),
    "nothing written": ("kd", None, [], "kd has no texts written before it trains"),
    "an endpoint": ("seqkd", "endpoint:http://127.0.0.1:9/v1#m", [], "no model of this machine"),
    "chat": ("seqkd", None, ["--set", "method.chat=true"], "method.chat is for an endpoint"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(place, cli, vllm, tmp_path, name):
    method, teacher, more, said = MISTAKES[name]
    found = cli(*command(place, *more, method=method, teacher=teacher))
    assert found.code == 2, found.err
    assert said in found.problem
    assert not vllm()
    assert not (tmp_path / "out").exists()


def test_a_local_teacher_takes_no_setting_of_an_endpoint(place, cli):
    plain = [word for word in command(place, "--set", "method.chat=true") if word not in ("--generate-with", "vllm")]
    found = cli(*plain)
    assert found.code == 2, found.err
    assert found.problem == "method.chat is for an endpoint"


def test_it_must_be_installed(place, cli, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    found = cli(*command(place))
    assert found.code == 2
    assert found.problem == "--generate-with vllm: there is no program 'vllm'"
    assert "PATH" in found.err


def test_plain_text_has_no_prompts(place, cli, vllm, data, tmp_path):
    found = cli(*command(place, "--data", data("plain"), "--task", "causal-lm"))
    assert found.code == 2
    assert "has none" in found.problem
    assert not vllm()
