"""`compare`: methods and variants of one, each with its seeds; finished runs are taken as they are."""

import json

import pytest

from tests.pipelines.conftest import QUICK


def arguments(models, data, methods, folder, *more):
    given = ["compare", models("bert"), "--student", "layers:1", "--method", methods, "--data", data("text"), *QUICK]
    return [*given, "--max-steps", "2", "--batch-size", "4", "--seeds", "0,1", "-o", folder, *more]


def test_variants_of_a_method_are_compared(cli, models, data, tmp_path):
    names = ["kd:temperature=1", "kd:temperature=4:ce_weight=0.5"]
    folder = tmp_path / "out"
    given = arguments(models, data, ",".join(names), folder, "--set", "method.kd.kd_weight=0.7", "--json")
    done = cli(*given)
    assert done.code == 0, done.err
    assert list(done.answer["methods"]) == names
    assert [row[0] for row in done.answer["comparison"][1:]] == ["(teacher)", *names]
    table = (folder / "comparison.md").read_text()
    assert all(f"| {name} " in table for name in names)
    kinds = ["kd-temperature=1", "kd-temperature=4-ce_weight=0.5"]
    runs = sorted(f"{kind}-seed{seed}" for kind in kinds for seed in (0, 1))
    assert sorted(path.name for path in (folder / "runs").iterdir()) == runs
    asked = [json.loads((folder / "runs" / f"{kind}-seed1/kdtool.json").read_text()) for kind in kinds]
    assert [made["config"]["method"] for made in asked] == [
        {"name": "kd", "kd_weight": 0.7, "temperature": 1},
        {"name": "kd", "kd_weight": 0.7, "temperature": 4, "ce_weight": 0.5},
    ]
    weights = [folder / "runs" / f"{kind}-seed0/model.safetensors" for kind in kinds]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    # the same command again trains nothing, and another method is added to what is there
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    again = cli(*arguments(models, data, f"{','.join(names)},none", folder, "--set", "method.kd.kd_weight=0.7"))
    assert again.code == 0, again.err
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    assert before.items() < after.items()
    assert {path.parent.name for path in after.keys() - before.keys()} == {"none-seed0", "none-seed1"}
    assert set(json.loads((folder / "comparison.json").read_text())["methods"]) == {*names, "none"}


@pytest.mark.parametrize(
    ("methods", "problem"),
    [
        ("kd:temprature=1,kd", "unknown key 'method.kd.temprature' for kd"),
        ("kd:temperature=0", "method.kd.temperature=0: should be greater than 0"),
        ("kd:temperature=hot", "method.kd.temperature='hot'"),
        ("kd:4", "'4' is no setting"),
        ("kd:temperature", "'temperature' is no setting"),
        ("kd:temperature=1:temperature=2", "'temperature' comes twice"),
        ("kd:temperature=1,kd:temperature=1", "different names"),
        ("kdd:temperature=1", "unknown method 'kdd'"),
        (",", "different names"),
    ],
)
def test_mistakes_are_told_before_anything_runs(cli, models, data, tmp_path, methods, problem):
    done = cli(*arguments(models, data, methods, tmp_path / "out"))
    assert done.code == 2
    assert problem in done.problem
    assert not (tmp_path / "out").exists()
