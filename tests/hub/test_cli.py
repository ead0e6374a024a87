"""The command line against the fixture: pull, train, push, and what users see when the Hub says no."""

import json
import re

import pytest

from tests import tiny
from tests.hub.conftest import READER, STRANGER, TOKEN, files_of

QUICK = (
    *("--method", "kd", "--max-steps", "2", "--batch-size", "4", "--device", "cpu"),
    *("--set", "eval.latency=false", "--set", "output.plots=false", "--set", "eval.reload=false"),
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return files_of(tiny.bert(tmp_path_factory.mktemp("made") / "teacher", layers=2))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return files_of(tiny.bert(tmp_path_factory.mktemp("made") / "small", layers=1, seed=2))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return files_of(tiny.text_data(tmp_path_factory.mktemp("made") / "text"))


@pytest.fixture
def lab(hub, teacher, small, rows):
    hub.add("ada/teacher", teacher, private=True)
    hub.add("ada/small", small, private=True)
    hub.add("ada/reviews", rows, "datasets", private=True)
    return hub


def error_of(done):
    return json.loads(done.stdout)["error"]


def searched(folder, secret):
    """Files that hold a secret."""
    return [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and secret.encode() in p.read_bytes()]


def test_pull_train_push_and_use_again(lab, cli, process, tmp_path):
    done = cli(
        *("distill", "ada/teacher", "--student", "ada/small@main", "--data", "ada/reviews", "-o", "out"),
        *(*QUICK, "--push", "ada/student", "--private", "--commit-message", "Try", "--json", "-vv", "--token", TOKEN),
        KDTOOL_DEBUG="1",
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)["push"]
    repo = lab.repos["models", "ada/student"]
    assert made == {"url": f"{lab.url}/ada/student", "commit": repo.refs["main"], "pull_request": None}
    assert repo.private
    assert [commit.title for commit in repo.commits.values()] == ["initial", "Try"]
    held = dict(repo.at("main").files)
    held.pop(".gitattributes")
    assert held == files_of(tmp_path / "out")
    assert '.from_pretrained("ada/student")' in held["README.md"].decode()
    pinned = {name: repo.refs["main"] for (_, name), repo in lab.repos.items()}
    manifest = json.loads(held["kdtool.json"])
    assert manifest["provenance"]["models"]["teacher"]["revision"] == pinned["ada/teacher"]
    assert manifest["provenance"]["models"]["student"]["revision"] == pinned["ada/small"]
    assert manifest["provenance"]["data"]["revision"] == pinned["ada/reviews"]
    assert TOKEN not in done.stdout + done.stderr
    assert searched(tmp_path, TOKEN) == searched(cli.home, TOKEN) == []
    first = next(i for i, request in enumerate(lab.log) if "/resolve/" in request.path)
    assert any("whoami" in request.path for request in lab.log[:first]), "permission is asked for first"
    uses = {
        {key.lower(): v for key, v in request.headers.items()}.get("authorization")
        for request in lab.asked("/api/models/")
    }
    assert uses == {f"Bearer {TOKEN}"}
    lab.log.clear()
    again = process(
        *("evaluate", "ada/teacher", "--data", "ada/reviews", "--offline", "--json"),
        *("--set", "eval.latency=false", "--device", "cpu"),
        HF_HOME=str(cli.home),
    )
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["data"]["revision"] == pinned["ada/reviews"]
    pins = f"ada/teacher@{pinned['ada/teacher']}", f"ada/reviews@{pinned['ada/reviews']}"
    again = cli("evaluate", pins[0], "--data", pins[1], "-q", "--set", "eval.latency=false", "--device", "cpu")
    assert again.returncode == 0, again.stderr
    assert [request.path for request in lab.log] == []


@pytest.mark.parametrize(
    ("token", "how", "message"),
    [
        (None, (), "publishing to 'ada/student' needs a token"),
        (READER, (), "your token may only read"),
        (STRANGER, (), "may not make repositories in the name of 'ada'"),
        (TOKEN, ("--push", "ada/open", "--private"), "is public, and the result is to be private"),
    ],
)
def test_push_is_refused_before_training(lab, cli, tmp_path, token, how, message):
    lab.add("ada/open", {})
    call = ("distill", "ada/teacher", "--student", "layers:1", "--data", "ada/reviews", "-o", "out", *QUICK)
    done = cli(*call, "--push", "ada/student", *how, "--json", token=token)
    assert done.returncode == 4, done.stderr
    assert message in error_of(done)["message"]
    assert not lab.asked("/resolve/|teacher|reviews|/commit/|/create")
    assert not (tmp_path / "out").exists()
    assert "training" not in done.stderr
    assert not token or token not in done.stdout + done.stderr


def test_export_to_a_pull_request_and_a_fault_at_the_end(lab, cli, tmp_path, small):
    for name, content in small.items():
        (tmp_path / "local").mkdir(exist_ok=True)
        (tmp_path / "local" / name).write_bytes(content)
    lab.add("bob/open", {"README.md": b"old"})
    done = cli("export", "local", "-o", "half", "--push", "bob/open", "--create-pr", "--json", token=TOKEN)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["push"]["pull_request"] == f"{lab.url}/bob/open/discussions/1"
    lab.fail("/commit/", status=500, times=99)
    done = cli("export", "local", "-o", "two", "--push", "open", "--json", *QUICK[-2:], token=TOKEN)
    assert done.returncode == 4
    assert "the result in two is complete, but not published" in error_of(done)["message"]
    assert (tmp_path / "two" / "model.safetensors").is_file()
    assert not (tmp_path / "two" / ".kdtool").exists()
    lab.faults.clear()
    command = re.search(r"(hf upload .*)$", error_of(done)["hint"])[1]
    assert command == "hf upload ada/open two . --exclude '.kdtool/*'"


MODELS = {
    "missing": ({}, "ada/nowhere", None, "does not exist on the Hub, or is private"),
    "private": ({"private": True}, "ada/model", STRANGER, "does not exist on the Hub, or is private"),
    "gated": ({"gated": "auto"}, "ada/model", STRANGER, "is gated"),
    "revision": ({}, "ada/model@v9", None, "has no revision 'v9'"),
    "bad token": ({}, "ada/model", "secret-of-nobody", "does not accept this token"),
}


@pytest.mark.parametrize(("facts", "name", "token", "message"), MODELS.values(), ids=MODELS.keys())
def test_one_clear_line_and_exit_4(hub, cli, tmp_path, small, facts, name, token, message):
    hub.add("ada/model", small, **facts)
    done = cli("evaluate", name, "--data", "banking77", token=token)
    assert done.returncode == 4
    lines = done.stderr.strip().splitlines()
    assert message in lines[0]
    assert lines[0].startswith("error: ")
    assert lines[-1].startswith("Hint: ")
    assert len(lines) <= 3
    assert "Traceback" not in done.stderr
    assert not token or token not in done.stdout + done.stderr
    for folder in (tmp_path, cli.home):
        assert not token or searched(folder, token) == []


def test_a_student_and_data_that_cannot_be_had(hub, cli, small, teacher, rows, tmp_path):
    hub.add("ada/teacher", teacher)
    hub.add("ada/gated", small, gated="auto")
    hub.add("ada/reviews", rows, "datasets")
    hub.add("ada/closed", rows, "datasets", gated="auto")
    call = ("distill", "ada/teacher", "-o", "out", "--json", *QUICK)
    done = cli(*call, "--student", "layers:1", "--data", "ada/closed")
    assert (done.returncode, error_of(done)["code"]) == (4, "hub")
    assert "data set 'ada/closed' is gated" in error_of(done)["message"]
    done = cli(*call, "--student", "ada/gated", "--data", "ada/reviews")
    assert (done.returncode, error_of(done)["code"]) == (4, "hub")
    assert "model 'ada/gated' is gated" in error_of(done)["message"]
    assert not (tmp_path / "out").exists()


def test_a_hub_that_is_down(hub, process):
    done = process("evaluate", "ada/model", "--data", "banking77", url="http://127.0.0.1:9")
    assert done.returncode == 4
    assert "error: the Hub cannot be reached for model 'ada/model'" in done.stderr
    assert "HF_ENDPOINT" in done.stderr
    done = process("evaluate", "ada/model", "--data", "banking77", "--offline", "--json")
    assert done.returncode == 4
    assert "offline, and nothing cached" in error_of(done)["message"]
    assert hub.log == []
