import sys

import datasets
import pytest
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from kdtool.data import hub_source
from kdtool.data.hub_source import HubReference
from kdtool.data.sources import load_data
from kdtool.errors import DataProblem, HubProblem, UsageProblem
from kdtool.run import Run
from kdtool.sections import DataSection

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch):
    """A Hub whose answer is set by the test; returns what was asked for."""
    asked = {}

    def answer(identifier, **how):
        asked.update(how, id=identifier)
        if isinstance(asked["answer"], Exception):
            raise asked["answer"]
        return asked["answer"]

    monkeypatch.setattr(datasets, "load_dataset", answer)
    monkeypatch.setattr(hub_source, "_commit", lambda reference: COMMIT)
    return asked


def rows(count):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "a"])})
    return datasets.Dataset.from_dict(
        {"text": ["t"] * count, "label": [i % 2 for i in range(count)]}, features=features
    )


def load(source, offline=False, **data):
    return load_data(DataSection(source=source, **data), ("text", "label"), (), Run(offline=offline))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("imdb", HubReference("imdb")),
        ("a/b:c@v1#train[:10%]", HubReference("a/b", "c", "v1", "train[:10%]")),
        ("a/b@refs/convert/parquet", HubReference("a/b", None, "refs/convert/parquet")),
        ("a/b#test", HubReference("a/b", None, None, "test")),
        ("a b", None),
        ("a/b/c", None),
    ],
)
def test_references(text, expected):
    assert HubReference.parse(text) == expected


def test_splits_class_names_and_pinned_commit(hub):
    hub["answer"] = datasets.DatasetDict({"train": rows(10), "validation": rows(4)})
    data = load("owner/set:part@main")
    assert data.labels == ["b", "a"]
    assert (len(data.train), data.validation, len(data.test)) == (10, None, 4)
    assert (hub["id"], hub["name"], hub["revision"], hub["split"]) == ("owner/set", "part", COMMIT, None)
    assert data.provenance["revision"] == COMMIT
    assert data.provenance["form"] == "hub"


def test_one_split_is_cut(hub):
    hub["answer"] = rows(20).shuffle(seed=0)
    data = load("owner/set#train[:20]")
    assert (len(data.train), len(data.test)) == (18, 2)
    assert hub["split"] == "train[:20]"


def test_configurations_of_converted_copies_are_folders(hub):
    hub["answer"] = datasets.DatasetDict({"train": rows(10)})
    load("owner/set:part@refs/convert/parquet")
    assert hub["data_dir"] == "part"
    assert "name" not in hub


@pytest.mark.parametrize(
    ("error", "problem", "message"),
    [
        (
            DatasetNotFoundError("Dataset 'owner/set' doesn't exist"),
            HubProblem,
            "does not exist on the Hub, or is private",
        ),
        (ConnectionError("cut"), HubProblem, "cannot be fetched"),
        (TimeoutError("slow"), HubProblem, "cannot be fetched"),
        (
            ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']"),
            DataProblem,
            "needs another configuration",
        ),
        (ValueError('Unknown split "tset". Should be one of ["train"].'), DataProblem, "has no split 'tset'"),
        (RuntimeError("Dataset scripts are no longer supported, but found set.py"), DataProblem, "made by a script"),
        (DatasetGenerationError("broken"), DataProblem, "cannot be read"),
    ],
)
def test_errors_are_sorted(hub, error, problem, message):
    hub["answer"] = error
    with pytest.raises(problem, match=message) as caught:
        load("owner/set#tset")
    assert type(caught.value) is problem
    assert "\n" not in str(caught.value.why)


def test_programming_errors_are_not_hidden(hub):
    hub["answer"] = KeyError("ours")
    with pytest.raises(KeyError):
        load("owner/set")


def test_offline_without_a_cached_copy(tmp_path):
    run = Run(offline=True, cache_dir=str(tmp_path))
    with pytest.raises(HubProblem, match="not in the cache, and offline is set"):
        load_data(DataSection(source="owner/set-that-is-nowhere"), ("text", "label"), (), run)
    with pytest.raises(HubProblem) as caught:
        load_data(DataSection(source="bankng77"), ("text", "label"), (), run)
    assert "banking77" in caught.value.hint


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageProblem) as caught:
        load("owner/set")
    assert caught.value.hint == "pip install 'kdtool[data]'"
