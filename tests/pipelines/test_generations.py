"""Generated texts on the way from the command line to the output folder."""

import json

import pytest

from tests.pipelines.conftest import QUICK


def test_generations_lie_beside_the_result_and_in_its_plots(cli, models, data, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "out"
    arguments = ["distill", models("llama"), "--student", "layers:2", "--method", "skd", "--data", data("prompts")]
    arguments += ["--max-steps", "3", "--batch-size", "4", *QUICK[:4], "--set", "train.log_every=1"]
    outcome = cli(*arguments, "--set", "method.save_generations=true", "--set", "method.k=3", "-o", folder)
    assert outcome.code == 0, outcome.err
    lines = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    assert sorted({line["step"] for line in lines}) == [1, 2, 3]
    manifest = json.loads((folder / "kdtool.json").read_text())
    assert {"generations.jsonl", "plots/texts.png"} <= set(manifest["files"])
    for row in manifest["history"]:
        own = [line for line in lines if line["step"] == row["step"]]
        sizes = [len(line["tokens"]) for line in own]
        mean = sum(line["acceptance"] * size for line, size in zip(own, sizes, strict=True)) / sum(sizes)
        assert row["parts"]["acceptance"] == pytest.approx(mean, abs=1e-3)
    assert not (folder / ".kdtool").exists()
