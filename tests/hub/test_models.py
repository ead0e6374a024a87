import os
import time

import pytest
from huggingface_hub import constants

from kdtool.errors import HubProblem, ModelProblem, UsageProblem
from kdtool.hub import ModelRef, cache, fetch_config, fetch_model
from kdtool.run import Run
from tests.hub.conftest import READER, SMALL, STRANGER, TOKEN, Listener, point

NOBODY = "http://127.0.0.1:9"


def fetch(run, text="lab/small"):
    return fetch_model(ModelRef.parse(text), run)


def fresh(**more):
    return Run(reporter=Listener(), **more)


def test_a_model_is_fetched_at_one_commit_and_only_what_is_needed(hub, near):
    repo = hub.add("lab/small", SMALL)
    folder, commit = fetch(near)
    assert commit == repo.refs["main"]
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == set(SMALL) - {
        "README.md",
        "onnx/model.onnx",
    }
    assert near.provenance["revisions"] == {"lab/small": commit}
    assert all(commit in request.path for request in hub.asked("/resolve/"))
    assert not list(folder.parent.parent.glob(".kdtool*"))


def test_the_commit_is_looked_up_once_in_a_run(hub, near):
    repo = hub.add("lab/small", SMALL)
    _, first = fetch(near)
    repo.commit({**SMALL, "tokenizer.json": b"[]"}, "second")
    hub.log.clear()
    _, again = fetch(near)
    assert (again, hub.log) == (first, [])
    _, later = fetch(fresh())
    assert later == repo.refs["main"] != first


@pytest.mark.parametrize("ref", ["v1", "refs/pr/1"])
def test_branches_tags_and_pull_requests(hub, near, ref):
    repo = hub.add("lab/small", SMALL)
    wanted = repo.commit({**SMALL, "tokenizer.json": b"[1]"}, "tag", ref)
    folder, commit = fetch(near, f"lab/small@{ref}")
    assert commit == wanted
    assert (folder / "tokenizer.json").read_bytes() == b"[1]"


def test_a_cached_commit_needs_no_request(hub, near):
    hub.add("lab/small", SMALL)
    _, commit = fetch(near)
    hub.log.clear()
    assert fetch(fresh(), f"lab/small@{commit}")[1] == commit
    assert fetch(fresh(offline=True))[1] == commit
    assert fetch(fresh(offline=True), "lab/small@main")[1] == commit
    assert hub.log == []


def test_offline_and_not_cached(hub, near):
    hub.add("lab/small", SMALL)
    with pytest.raises(HubProblem, match="cannot be had") as caught:
        fetch(fresh(offline=True))
    assert caught.value.why == "offline, and nothing cached"
    assert caught.value.exit_code == 4
    fetch_config(ModelRef.parse("lab/small"), near)
    hub.log.clear()
    with pytest.raises(HubProblem) as caught:
        fetch(fresh(offline=True))
    assert "only part of it" in caught.value.why
    assert hub.log == []


def test_offline_of_the_client_is_obeyed(hub, near, monkeypatch):
    hub.add("lab/small", SMALL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubProblem, match="cannot be had"):
        fetch(near)
    assert hub.log == []


def test_only_the_configuration(hub, near):
    hub.add("lab/small", SMALL)
    folder, _ = fetch_config(ModelRef.parse("lab/small"), near)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    full, _ = fetch(near)
    assert (full / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("facts", "token", "text", "message"),
    [
        ({"private": True}, None, "lab/small", "does not exist on the Hub, or is private, or you are not logged in"),
        ({"private": True}, STRANGER, "lab/small", "does not exist on the Hub, or is private"),
        ({}, None, "lab/smal", "does not exist on the Hub, or is private"),
        ({}, TOKEN, "lab/smal", "does not exist on the Hub, or is private"),
        ({"gated": "auto"}, None, "lab/small", "is gated, and access is not granted"),
        ({"gated": "manual"}, STRANGER, "lab/small", "is gated, and access is not granted"),
        ({"disabled": True}, TOKEN, "lab/small", "has been disabled"),
        ({}, None, "lab/small@v9", "has no revision 'v9'"),
        ({}, None, "lab/small@" + "0" * 40, "has no revision"),
        ({}, "secret-of-nobody", "lab/small", "does not accept this token"),
    ],
)
def test_refusals(hub, near, monkeypatch, facts, token, text, message):
    hub.add("lab/small", SMALL, **facts)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubProblem, match=message) as caught:
        fetch(near, text)
    problem = caught.value
    assert problem.hint
    assert problem.exit_code == 4
    said = f"{problem.message}{problem.why}{problem.hint}"
    assert "\n" not in said
    assert "secret" not in said
    assert len([r for r in hub.log if "/api/models/" in r.path]) == 1, "a refusal is not asked about again"


@pytest.mark.parametrize("facts", [{"private": True}, {"gated": "manual"}])
@pytest.mark.parametrize("token", [TOKEN, READER, STRANGER])
def test_members_and_granted_users_may_read(hub, near, monkeypatch, facts, token):
    repo = hub.add("ada/small", SMALL, granted={"bob"}, **facts)
    monkeypatch.setenv("HF_TOKEN", token)
    assert fetch(near, "ada/small")[1] == repo.refs["main"]


def test_a_renamed_model_is_followed_and_announced(hub, near):
    repo = hub.add("lab/new", SMALL)
    hub.moved["models", "lab/old"] = "lab/new"
    folder, commit = fetch(near, "lab/old")
    assert commit == repo.refs["main"]
    assert (folder / "model.safetensors").is_file()
    assert near.reporter.warnings == ["model 'lab/old' is now called 'lab/new' on the Hub"]
    assert near.provenance["renamed"] == {"lab/old": "lab/new"}
    hub.log.clear()
    assert fetch(fresh(offline=True), "lab/old")[1] == commit
    assert hub.log == []


def test_large_files_may_come_from_elsewhere_without_the_token(hub, near, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add("ada/small", SMALL, private=True)
    hub.cdn = hub.url.replace("127.0.0.1", "localhost")
    folder, _ = fetch(near, "ada/small")
    assert (folder / "model.safetensors").read_bytes() == SMALL["model.safetensors"]
    served = hub.asked("/cdn/")
    assert served
    assert all("Authorization" not in request.headers for request in served)


def test_pickle_only_is_refused_before_anything_is_fetched(hub, near):
    files = {"config.json": SMALL["config.json"], "pytorch_model.bin": b"x"}
    hub.add("lab/old", files)
    with pytest.raises(ModelProblem, match="has only pickle weights"):
        fetch(near, "lab/old")
    assert not hub.asked("/resolve/")
    folder, _ = fetch(fresh(allow_pickle=True), "lab/old")
    assert (folder / "pytorch_model.bin").is_file()


def test_names_cannot_leave_the_folder(hub, near, tmp_path):
    hub.add("lab/small", {**SMALL, "../../../../evil.json": b"{}", "/evil.json": b"{}"})
    folder, _ = fetch(near)
    assert not list(tmp_path.rglob("evil.json"))
    assert (folder / "config.json").is_file()


PASSING = {
    "info 429": {"path": "/api/models/lab", "status": 429, "headers": {"Retry-After": "0"}},
    "info 429 with a rate limit": {
        "path": "/api/models/lab",
        "status": 429,
        "headers": {"RateLimit": '"api";r=0;t=0'},
    },
    "info 500": {"path": "/api/models/lab", "status": 500, "times": 2},
    "info 502": {"path": "/api/models/lab", "status": 502, "times": 3},
    "info 503": {"path": "/api/models/lab", "status": 503, "times": 4},
    "info 504": {"path": "/api/models/lab", "status": 504},
    "info closed": {"path": "/api/models/lab", "close": True, "times": 2},
    "info cut": {"path": "/api/models/lab", "cut": 20},
    "info slow": {"path": "/api/models/lab", "delay": 0.2},
    "head 503": {"path": "/resolve/.*safetensors", "method": "HEAD", "status": 503, "times": 2},
    "head 429": {
        "path": "/resolve/.*safetensors",
        "method": "HEAD",
        "status": 429,
        "headers": {"Retry-After": "0"},
    },
    "head closed": {"path": "/resolve/.*safetensors", "method": "HEAD", "close": True, "times": 2},
    "file 503": {"path": "/resolve/.*safetensors", "method": "GET", "status": 503, "times": 3},
    "file 500": {"path": "/resolve/.*json", "method": "GET", "status": 500, "times": 2},
    "file 429": {"path": "/resolve/.*safetensors", "method": "GET", "status": 429, "headers": {"Retry-After": "0"}},
    "file closed": {"path": "/resolve/.*safetensors", "method": "GET", "close": True, "times": 2},
    "file cut": {"path": "/resolve/.*safetensors", "method": "GET", "cut": 5000},
    "file cut twice": {"path": "/resolve/.*safetensors", "method": "GET", "cut": 3000, "times": 2},
    "file cut at once": {"path": "/resolve/.*safetensors", "method": "GET", "cut": 0},
    "small file cut": {"path": "/resolve/.*config.json", "method": "GET", "cut": 3},
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_faults_that_pass(hub, near, fault):
    hub.add("lab/small", SMALL)
    hub.fail(**fault)
    folder, _ = fetch(near)
    assert (folder / "model.safetensors").read_bytes() == SMALL["model.safetensors"]
    assert all(one.times == 0 for one in hub.faults), "the fault has happened"


def test_a_cut_download_goes_on_where_it_stopped(hub, near, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is not a whole chunk is not written
    hub.add("lab/small", SMALL)
    hub.fail("/resolve/.*safetensors", method="GET", cut=5000)
    fetch(near)
    ranges = [r.headers.get("Range") for r in hub.asked("safetensors", "GET")]
    assert ranges[-1] == "bytes=5000-"


def test_the_server_says_how_long_to_wait(hub, near):
    hub.add("lab/small", SMALL)
    hub.fail("/api/models/lab", status=429, headers={"Retry-After": "1"})
    began = time.monotonic()
    fetch(near)
    assert time.monotonic() - began >= 1.0
    assert any("answered 429" in line and "1.0 s" in line for line in near.reporter.lines)


LASTING = {
    "429": ({"status": 429}, "limits how often"),
    "long wait": ({"status": 429, "headers": {"Retry-After": "3600"}}, "limits how often"),
    "503": ({"status": 503}, "failed with status 503"),
    "closed": ({"close": True}, "connection to the Hub broke"),
    "403": ({"status": 403}, "your token may not use"),
    "418": ({"status": 418}, "refused model 'lab/small'"),
}


@pytest.mark.parametrize(("fault", "message"), LASTING.values(), ids=LASTING.keys())
def test_faults_that_last(hub, near, fault, message):
    hub.add("lab/small", SMALL)
    hub.fail("/api/models/", times=99, **fault)
    began = time.monotonic()
    with pytest.raises(HubProblem, match=message) as caught:
        fetch(near)
    assert "\n" not in f"{caught.value.message}{caught.value.why}{caught.value.hint}"
    assert time.monotonic() - began < 5
    assert len(hub.log) <= 5


def test_all_waiting_ends_at_the_deadline(hub, near, monkeypatch):
    hub.add("lab/small", SMALL)
    hub.fail("/api/models/", times=99, status=429, headers={"Retry-After": "0.3"})
    monkeypatch.setenv("KDTOOL_HUB_DEADLINE", "0.5")
    with pytest.raises(HubProblem, match="limits how often"):
        fetch(near)
    assert len(hub.log) == 2
    monkeypatch.setenv("KDTOOL_HUB_DEADLINE", "soon")
    with pytest.raises(UsageProblem, match="KDTOOL_HUB_DEADLINE=soon"):
        fetch(near)


def test_what_was_fetched_before_a_lasting_fault_is_kept(hub, near):
    hub.add("lab/small", SMALL)
    fault = hub.fail("/resolve/.*safetensors", method="GET", status=500, times=99)
    with pytest.raises(HubProblem, match="failed with status 500") as caught:
        fetch(near)
    assert caught.value.hint == "run again: 3 of 4 files are in the cache and stay there"
    with pytest.raises(HubProblem) as caught:
        fetch(fresh(offline=True))
    assert "part of it" in caught.value.why or "nothing cached" in caught.value.why
    fault.times = 0
    hub.log.clear()
    folder, _ = fetch(fresh())
    assert (folder / "model.safetensors").is_file()
    assert [r.path.rsplit("/", 1)[1] for r in hub.asked("/resolve/", "GET")] == ["model.safetensors"]


def test_a_half_fetched_model_is_not_taken_for_a_whole_one(hub, near):
    hub.add("lab/small", SMALL)
    fault = hub.fail("/resolve/.*tokenizer.json", method="GET", status=500, times=99)
    with pytest.raises(HubProblem):
        fetch(near)
    fault.times = 0
    commit = hub.repos["models", "lab/small"].refs["main"]
    folder, _ = fetch(fresh(), f"lab/small@{commit}")
    assert (folder / "tokenizer.json").is_file()


@pytest.mark.parametrize("fault", [None, {"status": 503}, {"close": True}, {"status": 429}])
def test_without_the_hub_the_cached_model_is_used_and_this_is_said(hub, near, monkeypatch, tmp_path, fault):
    hub.add("lab/small", SMALL)
    _, commit = fetch(near)
    if fault is None:
        point(monkeypatch, NOBODY, tmp_path / "home")
    else:
        hub.fail("/api/models/", times=99, **fault)
    run = fresh()
    assert fetch(run)[1] == commit
    assert len(run.reporter.warnings) == 1
    assert f"using the copy in the cache, commit {commit[:12]}" in run.reporter.warnings[0]


def test_without_the_hub_and_without_a_copy(hub, near, monkeypatch, tmp_path):
    point(monkeypatch, NOBODY, tmp_path / "home")
    with pytest.raises(HubProblem, match="the Hub cannot be reached") as caught:
        fetch(near)
    assert "HF_ENDPOINT" in caught.value.hint


def test_a_refusal_is_not_papered_over_by_the_cache(hub, near):
    repo = hub.add("lab/small", SMALL)
    fetch(near)
    repo.disabled = True
    with pytest.raises(HubProblem, match="disabled"):
        fetch(fresh())


def test_leftovers_of_killed_downloads_go_after_a_day(hub, near):
    hub.add("lab/small", SMALL)
    blobs = cache.storage("model", "lab/small", None) / "blobs"
    blobs.mkdir(parents=True)
    old, new = blobs / "a.1.incomplete", blobs / "b.2.incomplete"
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 90000,) * 2)
    fetch(near)
    assert (old.exists(), new.exists()) == (False, True)


def test_revisions_cannot_leave_the_cache(tmp_path):
    cache.remember(tmp_path / "repo", "../../evil", "0" * 40)
    assert list(tmp_path.rglob("*")) == []
    assert cache.recall(tmp_path / "repo", "../../evil") is None
