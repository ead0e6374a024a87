import json

import datasets
import numpy as np
import pytest

from kdtool.data.sources import load_data
from kdtool.errors import DataProblem, HubProblem
from kdtool.run import Run
from kdtool.sections import DataSection
from tests.hub.conftest import STRANGER, TOKEN, Listener, point


def rows(count, word="t"):
    return "\n".join(json.dumps({"text": f"{word} {i}", "label": i % 2}) for i in range(count)).encode()


FILES = {"README.md": b"# a set\n", "train.jsonl": rows(8), "test.jsonl": rows(4)}
CONFIGS = {
    "README.md": b"""---
configs:
- config_name: a
  data_files: a.jsonl
- config_name: b
  data_files: b.jsonl
---
""",
    "a.jsonl": rows(6),
    "b.jsonl": rows(10),
}


@pytest.fixture
def sets(hub, near, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home" / "datasets")
    monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    from huggingface_hub import HfFileSystem

    HfFileSystem.clear_instance_cache()
    return hub


def load(source="lab/set", run=None, **more):
    run = run or Run(reporter=Listener(), **more)
    return load_data(DataSection(source=source), ("text", "label"), (), run)


def test_a_set_is_read_at_one_commit(sets):
    repo = sets.add("lab/set", FILES, "datasets")
    data = load()
    assert (len(data.train), len(data.test)) == (8, 4)
    assert data.provenance["revision"] == repo.refs["main"]
    assert all(repo.refs["main"] in request.path for request in sets.asked("/resolve/"))


def test_revision_configuration_and_split(sets):
    repo = sets.add("lab/set", CONFIGS, "datasets")
    old = repo.refs["main"]
    repo.commit({**CONFIGS, "b.jsonl": rows(20)})
    assert len(load("lab/set:b#train[:50%]").train) == 9
    data = load(f"lab/set:b@{old}")
    assert len(data.train) + len(data.test) == 10
    assert data.provenance["revision"] == old


def test_a_cached_commit_needs_no_request_and_is_never_another(sets):
    repo = sets.add("lab/set", FILES, "datasets")
    old = repo.refs["main"]
    load()
    repo.commit({**FILES, "train.jsonl": rows(6, "u")})
    load()
    sets.log.clear()
    data = load(f"lab/set@{old}")
    assert data.train.columns["text"][0] == "t 0"
    data = load(f"lab/set@{old}", offline=True)
    assert (len(data.train), data.train.columns["text"][0]) == (8, "t 0")
    data = load(offline=True)
    assert (len(data.train), data.train.columns["text"][0]) == (6, "u 0")
    assert data.provenance["revision"] == repo.refs["main"]
    assert sets.log == []


def test_classes_survive_the_cache(sets):
    card = b"""---
dataset_info:
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': bad
          '1': good
---
"""
    sets.add("lab/set", {**FILES, "README.md": card}, "datasets")
    first = load()
    again = load(offline=True)
    assert first.labels == again.labels == ["bad", "good"]
    np.testing.assert_array_equal(first.train.columns["label"], again.train.columns["label"])


def test_offline_and_not_cached(sets):
    repo = sets.add("lab/set", FILES, "datasets")
    with pytest.raises(HubProblem, match="'lab/set' is not in the cache, and offline is set"):
        load(offline=True)
    load()
    sets.log.clear()
    with pytest.raises(HubProblem, match="at 'v2' is not in the cache"):
        load("lab/set@v2", offline=True)
    with pytest.raises(HubProblem, match="is not in the cache"):
        load("lab/set@" + "0" * 40, offline=True)
    assert sets.log == []
    assert load(f"lab/set@{repo.refs['main']}", offline=True)


@pytest.mark.parametrize(
    ("facts", "token", "source", "message"),
    [
        ({"private": True}, None, "lab/set", "does not exist on the Hub, or is private"),
        ({"private": True}, STRANGER, "lab/set", "does not exist on the Hub, or is private"),
        ({}, TOKEN, "lab/sett", "does not exist on the Hub, or is private"),
        ({"gated": "auto"}, None, "lab/set", "is gated, and access is not granted"),
        ({"gated": "auto"}, STRANGER, "lab/set", "is gated, and access is not granted"),
        ({"disabled": True}, TOKEN, "lab/set", "has been disabled"),
        ({}, None, "lab/set@v9", "has no revision 'v9'"),
        ({}, "secret-of-nobody", "lab/set", "does not accept this token"),
    ],
)
def test_refusals(sets, monkeypatch, facts, token, source, message):
    sets.add("lab/set", FILES, "datasets", **facts)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubProblem, match=message) as caught:
        load(source)
    said = f"{caught.value.message}{caught.value.why}{caught.value.hint}"
    assert caught.value.hint
    assert "\n" not in said
    assert "secret" not in said


def test_a_private_set_of_ones_own(sets, monkeypatch):
    sets.add("ada/set", FILES, "datasets", private=True, gated="auto")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert len(load("ada/set").train) == 8


@pytest.mark.parametrize(
    "fault",
    [
        {"path": "/api/datasets/lab/set", "status": 503, "times": 2},
        {"path": "/api/datasets/lab/set", "status": 429, "headers": {"Retry-After": "0"}},
        {"path": "/api/datasets/lab/set", "close": True},
        {"path": "/resolve/.*train.jsonl", "method": "GET", "status": 503},
        {"path": "/resolve/.*train.jsonl", "method": "GET", "cut": 40},
        {"path": "/resolve/.*train.jsonl", "method": "GET", "close": True},
        {"path": "/tree/", "status": 502},
    ],
)
def test_faults_that_pass(sets, fault):
    sets.add("lab/set", FILES, "datasets")
    sets.fail(**fault)
    assert len(load().train) == 8
    assert all(one.times == 0 for one in sets.faults)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"path": "/api/datasets/", "status": 503}, "failed with status 503"),
        ({"path": "/api/datasets/", "close": True}, "connection to the Hub broke"),
        ({"path": "/api/datasets/", "status": 403}, "your token may not use"),
    ],
)
def test_faults_that_last(sets, fault, message):
    sets.add("lab/set", FILES, "datasets")
    sets.fail(times=999, **fault)
    with pytest.raises(HubProblem, match=message):
        load()


def test_without_the_hub_the_cached_set_is_used_and_this_is_said(sets, monkeypatch, tmp_path):
    repo = sets.add("lab/set", FILES, "datasets")
    load()
    point(monkeypatch, "http://127.0.0.1:9", tmp_path / "home")
    run = Run(reporter=Listener())
    assert len(load(run=run).train) == 8
    assert f"using the copy in the cache, commit {repo.refs['main'][:12]}" in run.reporter.warnings[0]
    with pytest.raises(HubProblem, match="the Hub cannot be reached"):
        load("lab/other")


def test_what_is_wrong_with_the_data_is_no_fault_of_the_hub(sets):
    sets.add("lab/set", CONFIGS, "datasets")
    with pytest.raises(DataProblem, match="needs another configuration"):
        load("lab/set:c")
    with pytest.raises(DataProblem, match="needs another configuration"):
        load("lab/set")
    with pytest.raises(DataProblem, match="has no split 'tset'"):
        load("lab/set:a#tset")
    sets.add("lab/broken", {"train.jsonl": b'{"text": '}, "datasets")
    with pytest.raises(DataProblem, match="cannot be read"):
        load("lab/broken")
