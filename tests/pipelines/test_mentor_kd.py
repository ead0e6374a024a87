"""Mentor-KD and its teachers through the real command line."""

import json
import shutil

import pytest

from tests import chains
from tests.endpoint.server import Fault, Server
from tests.pipelines.conftest import QUICK, start, wait

FEW = [
    "--max-steps",
    "2",
    "--batch-size",
    "4",
    "--set",
    "eval.answers=svamp",
    "--set",
    "eval.max_new_tokens=16",
    *QUICK,
]
METHOD = {
    "mentor_epochs": 1,
    "n_teacher": 2,
    "n_aug": 1,
    "max_new_tokens": 8,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tiny models, data and a file of rationales."""
    root = tmp_path_factory.mktemp("chains")
    for seed, name in enumerate(("teacher", "mentor", "student")):
        chains.speller(root / name, seed=seed)
    chains.data(root / "data")
    chains.teacher_file(root / "teacher.jsonl", chains.sums(8))
    return root


def command(place, teacher, *more, **changes):
    values = {"mentor": place / "mentor", **METHOD, **changes}
    settings = [word for name, value in values.items() for word in ("--set", f"method.{name}={value}")]
    given = ["distill", teacher, "--method", "mentor-kd", "--student", place / "student", "--data", place / "data"]
    return [*given, *settings, *FEW, *more]


@pytest.fixture
def server():
    with Server() as running:
        running.write = chains.solver
        yield running


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_command_from_an_endpoint_to_a_student(place, server, tmp_path):
    server.key = "key-of-this-test-0123456789"
    server.faults = [Fault(429, headers={"Retry-After": "0"}), Fault(cut=1)]
    env_key = {"KDTOOL_ENDPOINT_KEY": server.key, "KDTOOL_ENDPOINT_BACKOFF": "0.01"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.pipelines.conftest.clean_environment", with_key(env_key))
        found = wait(start(*command(place, server.reference, "-o", "out", "--json"), folder=tmp_path))
    assert found.code == 0, found.err
    made = {path.name: lines(path) for path in (tmp_path / "out" / "data").iterdir()}
    assert set(made) == {"chains.jsonl", "annotations.jsonl", "augmented.jsonl", "train.jsonl"}
    assert len(made["chains.jsonl"]) == len(made["annotations.jsonl"]) == 16
    assert sum(row["initial_correct"] for row in made["annotations.jsonl"]) == 8
    assert {row["provenance"]["endpoint"] for row in made["annotations.jsonl"]} == {server.url}
    assert len(made["augmented.jsonl"]) == 8
    assert made["augmented.jsonl"][0]["provenance"]["weights"]
    assert not any("guess" in row["chain"] for row in made["train.jsonl"])
    manifest = json.loads((tmp_path / "out" / "kdtool.json").read_text())
    assert {"data/annotations.jsonl", "data/train.jsonl"} <= set(manifest["files"])
    stages = manifest["provenance"]["stages"]
    assert stages["annotate"] == {"rows": 16, "right": 8, "questions": 8, "answered": 8}
    assert stages["fit-mentor"]["rows"] == 8
    assert not (tmp_path / "out" / ".kdtool").exists()
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or server.key.encode() not in path.read_bytes(), path
    assert server.key not in found.err + found.out
    assert set(found.answer["metrics"]["student"]) == {"exact-answer"}
    assert found.answer["metrics"]["teacher"], "the mentor stands beside the student"


def with_key(more):
    from tests.cli.conftest import clean_environment

    return lambda extra=None: clean_environment({**(extra or {}), **more})


def test_a_teacher_in_memory_a_file_and_no_mentor(place, cli, tmp_path):
    found = cli(*command(place, place / "teacher", "-o", "out"))
    # a random teacher is hardly ever right: then there is nothing to learn, and what it wrote is kept
    if found.code == 2:
        assert "no rationale ends in the right answer" in found.problem
        assert len(lines(tmp_path / "out" / ".kdtool" / "kept" / "data" / "annotations.jsonl")) == 16
    found = cli(*command(place, place / "teacher.jsonl", "-o", "sld", "--save-teacher", n_aug=0))
    assert found.code == 0, found.err
    assert (tmp_path / "sld" / "teacher" / "model.safetensors").is_file()
    found = cli(*command(place, place / "teacher.jsonl", "-o", "vanilla", n_aug=0, kd_lambda=0.0, mentor="null"))
    assert found.code == 0, found.err
    assert {path.name for path in (tmp_path / "vanilla" / "data").iterdir()} == {"annotations.jsonl", "train.jsonl"}
    assert "teacher" not in json.loads((tmp_path / "vanilla" / "kdtool.json").read_text())["models"]


def test_models_with_an_encoder(place, cli, tmp_path):
    for seed, name in enumerate(("t5-mentor", "t5-student")):
        chains.encoder_decoder(tmp_path / name, seed)
    given = command(
        place, place / "teacher.jsonl", "--student", tmp_path / "t5-student", "-o", "out", mentor=tmp_path / "t5-mentor"
    )
    found = cli(*given)
    assert found.code == 0, found.err
    manifest = json.loads((tmp_path / "out" / "kdtool.json").read_text())
    assert manifest["task"] == "seq2seq-lm"
    assert {"ce", "kd"} <= set(manifest["history"][0]["parts"])
    assert len(lines(tmp_path / "out" / "data" / "augmented.jsonl")) == 8


def test_annotations_of_one_run_are_the_teacher_of_the_next(place, server, cli, tmp_path, monkeypatch):
    options = {"n_aug": 0, "kd_lambda": 0.0}
    first = cli(*command(place, server.reference, "-o", "one", **options))
    assert first.code == 0, first.err
    asked = len(server.asked)
    second = cli(*command(place, tmp_path / "one" / "data" / "annotations.jsonl", "-o", "two", **options))
    assert second.code == 0, second.err
    assert len(server.asked) == asked
    chains_of = [[row["chain"] for row in lines(tmp_path / name / "data" / "train.jsonl")] for name in ("one", "two")]
    assert chains_of[0] == chains_of[1]


def test_what_an_endpoint_wrote_outlives_its_end(place, server, cli, tmp_path):
    server.faults = [Fault(times=5), Fault(400, times=99)]
    given = command(place, server.reference, "-o", "out", n_aug=0, kd_lambda=0.0)
    found = cli(*given)
    assert found.code == 4, found.err
    assert server.url in found.problem
    part = tmp_path / "out" / ".kdtool" / "kept" / "data" / "chains.jsonl.part"
    kept = len(lines(part))
    assert 2 <= kept <= 10
    server.faults = []
    before = len(server.asked)
    assert cli(*given).code == 0
    assert len(server.asked) - before == (16 - kept) // 2 + 16


def test_data_that_changed_meanwhile_is_annotated_anew(place, server, cli, tmp_path):
    shutil.copytree(place / "data", tmp_path / "data")
    given = command(place, server.reference, "-o", "out", "--data", tmp_path / "data", n_aug=0, kd_lambda=0.0)
    server.faults = [Fault(times=8), Fault(400, times=99)]
    assert cli(*given).code == 4
    server.faults = []
    chains.data(tmp_path / "data", count=6)
    assert cli(*given).code == 0
    rows = lines(tmp_path / "out" / "data" / "annotations.jsonl")
    assert {row["input"] for row in rows} == {row["question"] for row in chains.sums(6)}


MISTAKES = {
    "endpoint down": (4, "cannot be reached", ["endpoint:http://127.0.0.1:9/v1#tiny"], {}),
    "key in the address": (2, "no user, password or key", ["endpoint:http://a:hidden@127.0.0.1:9/v1#m"], {}),
    "no model": (2, "names no model", ["endpoint:http://127.0.0.1:9/v1"], {}),
    "file missing": (2, "does not exist", ["none.jsonl"], {}),
    "unknown rules": (2, "no rule 'nothing'", [], {}, "eval.answers=nothing"),
    "rules that find no answers": (2, "no answer by the rule 'text'", [], {}, "eval.answers=text"),
    "no mentor": (2, "no mentor", [], {"mentor": "null"}),
    "mentor missing": (2, "does not exist", [], {"mentor": "./none"}),
    "augmented missing": (2, "does not exist", [], {"augmented": "none.jsonl"}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(place, cli, tmp_path, name):
    code, said, teacher, changes, *more = MISTAKES[name]
    more = [word for setting in more for word in ("--set", setting)]
    found = cli(*command(place, teacher[0] if teacher else place / "teacher.jsonl", "-o", "out", *more, **changes))
    assert found.code == code, found.err
    assert said in found.problem
    assert "hidden" not in found.err
    assert "Traceback" not in found.err


def test_gold_answers_must_be_there(place, cli, tmp_path):
    rows = [{"question": row["question"], "answer": ""} for row in chains.sums(6)]
    for split in ("train", "test"):
        chains.write_rows(tmp_path / "empty" / f"{split}.jsonl", rows)
    found = cli(*command(place, place / "teacher.jsonl", "-o", "out", "--data", tmp_path / "empty"))
    assert found.code == 2
    assert "without an answer" in found.problem
    assert not (tmp_path / "out").exists()


def test_seqkd_learns_what_an_endpoint_answers(place, server, cli, tmp_path):
    server.write = lambda prompt, number: f" Surely {prompt.split('is ')[1][0]}."
    given = ["distill", server.reference, "--student", place / "student", "--method", "seqkd", "--data", place / "data"]
    found = cli(*given, "-o", "out", *FEW)
    assert found.code == 0, found.err
    rows = lines(tmp_path / "out" / "data" / "responses.jsonl")
    assert rows[3]["prompt"] == "What is 1 and 0?\n"
    assert rows[3]["response"] == "Surely 1."
    assert rows[3]["provenance"]["endpoint"] == server.url
    assert {asked["prompt"] for asked in server.asked} == {row["prompt"] for row in rows}
    plain = cli(*given, "-o", "chat", *FEW, "--set", "method.chat=true", "--set", "method.stop_strings=['.']")
    assert plain.code == 0, plain.err
    assert server.asked[-1]["messages"][0]["content"].endswith("?")
    assert server.asked[-1]["stop"] == ["."]
    assert "this is a file" in cli(*given[:1], place / "teacher.jsonl", *given[2:], "-o", "file").problem


def test_other_methods_refuse_a_teacher_that_only_writes(place, cli):
    for teacher, what in (("endpoint:http://127.0.0.1:9/v1#m", "an endpoint"), (place / "teacher.jsonl", "a file")):
        given = ["distill", teacher, "--student", place / "student", "--method", "kd", "--data", place / "data"]
        found = cli(*given, "-o", "out")
        assert found.code == 2
        assert f"{what} gives only texts" in found.problem
        assert "mentor-kd" in found.err


def test_a_dry_run_asks_nobody(place, cli, server):
    found = cli(*command(place, server.reference, "-o", "out", "--dry-run", "--json"))
    assert found.code == 0, found.err
    assert found.answer["plan"]["teacher"] == {"name": server.reference}
    assert not server.asked
