"""Stages before training, killed in the middle: the same command goes on, and ends as if nothing had happened."""

import json

import pytest

from tests import chains
from tests.reliability.conftest import QUICK


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """A run of all stages with a teacher in memory: every word of it depends on draws."""
    root = tmp_path_factory.mktemp("stages")
    for seed, name in enumerate(("teacher", "mentor", "student")):
        chains.speller(root / name, seed=seed, letters="ABCDE" * (name == "teacher"))
    rows = [{"question": f"Letter {i}?", "answer": letter} for i, letter in enumerate("ABCDEABC")]
    for split in ("train", "test"):
        chains.write_rows(root / "data" / f"{split}.jsonl", rows)
    given = ["distill", root / "teacher", "--method", "mentor-kd", "--student", root / "student"]
    given += ["--data", root / "data", "--max-steps", "3", "--batch-size", "4", "--set", "train.checkpoint_every=1"]
    values = {"mentor": root / "mentor", "mentor_epochs": 2, "n_teacher": 3, "n_keep": 0, "n_aug": 4}
    values |= {"max_new_tokens": 16, "temperature": 1.0}
    given += [word for name, value in values.items() for word in ("--set", f"method.{name}={value}")]
    return [
        str(word) for word in [*given, "--set", "eval.batch_size=8", "--set", "eval.answers=commonsense_qa", *QUICK]
    ]


@pytest.fixture(scope="session")
def whole(driver, stages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    ended = driver.run(*stages, "-o", folder)
    assert ended.code == 0, ended.text
    return folder, ended.events


FILES = ("chains", "annotations", "augmented", "train")


def result(folder):
    rows = {name: (folder / "data" / f"{name}.jsonl").read_bytes() for name in FILES}
    manifest = json.loads((folder / "kdtool.json").read_text())
    return (
        rows
        | {"weights": (folder / "model.safetensors").read_bytes(), "history": manifest["history"]}
        | {"stages": manifest["provenance"]["stages"]}
    )


def places(events):
    """Stage to an event in its middle."""
    ends = {name: events.index(f"replace .{name}.jsonl.part") for name in FILES}
    steps = [i for i, name in enumerate(events) if name == "step"]
    fit = [i for i in steps if i < ends["augmented"]]
    train = [i for i in steps if i > ends["train"]]
    syncs = [i for i, name in enumerate(events) if name.startswith("fsync")]

    def middle(first, last):
        inside = [i for i in syncs if first < i < last]
        return inside[len(inside) // 2] + 1

    return {
        "annotate": middle(ends["chains"], ends["annotations"]),
        "fit-mentor": fit[len(fit) // 2],
        "augment": middle(fit[-1] + 20, ends["augmented"]),
        "distill": train[len(train) // 2],
    }


@pytest.mark.parametrize("stage", ["annotate", "fit-mentor", "augment", "distill"])
def test_a_killed_stage_is_taken_up(driver, stages, whole, tmp_path, stage):
    folder, events = whole
    killed = driver.run(*stages, "-o", tmp_path / "out", event=places(events)[stage])
    assert killed.signal == 9, killed.text
    ended = driver.run(*stages, "-o", tmp_path / "out")
    assert ended.code == 0, ended.text
    found, expected = result(tmp_path / "out"), result(folder)
    for name, value in expected.items():
        assert found[name] == value, name
