import hashlib
import importlib.util
import json
import math
import shlex

import pytest

from kdtool.config import load_config
from kdtool.proof import Proof
from kdtool.report import write_manifest, write_report
from kdtool.run import Run

SECRET = "hf_abcdefgh12345678"


def manifest(folder, config, proof, **extra):
    command = ["kdtool", "distill", "owner/teacher", "--token", SECRET, "-o", "out dir"]
    run = Run(seed=7, provenance={"models": {"teacher": "owner/teacher@0"}, "loss": math.nan})
    write_manifest(folder, config, proof, run, command, extra)
    return json.loads((folder / "kdtool.json").read_text(encoding="utf-8"))


def test_manifest_is_a_configuration_again(tmp_path, config, proof):
    config.data.text = "\u00e9\U0001f600 'quoted' \t"
    manifest(tmp_path, config, proof, seconds=1.5)
    config.method = {}  # plug-ins are checked elsewhere
    manifest(tmp_path, config, proof, seconds=1.5)
    assert load_config("distill", tmp_path / "kdtool.json") == config


def test_manifest_holds_what_a_repeat_needs(tmp_path, config, proof):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.bin").write_bytes(b"abc")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "b").write_bytes(b"x")
    manifest(tmp_path, config, proof)
    values = manifest(tmp_path, config, proof, seconds=1.5, steps=30, seed=99)
    assert values["files"] == {"sub/a.bin": {"sha256": hashlib.sha256(b"abc").hexdigest(), "bytes": 3}}
    assert (values["seed"], values["seconds"], values["steps"]) == (7, 1.5, 30)
    assert values["provenance"] == {"models": {"teacher": "owner/teacher@0"}, "loss": None}
    assert shlex.split(values["command"])[-1] == "out dir"
    assert values["environment"]["versions"]["numpy"]
    assert set(values["metrics"]) == {"student", "teacher", "retention"}
    assert len(values["gates"]) == 2
    assert values["reload"]["passed"]


def test_nothing_written_holds_a_secret_or_the_folder(tmp_path, config, proof, history):
    proof.student.name = f"out/{SECRET}"
    config.data.source = f"data-{SECRET}"
    write_report(tmp_path, proof, history, config, plots=False)
    manifest(tmp_path, config, proof)
    for path in tmp_path.rglob("*.*"):
        text = path.read_text(encoding="utf-8")
        assert SECRET not in text
        assert str(tmp_path) not in text


def test_report_says_everything_and_draws_the_same_plots_twice(tmp_path, config, proof, history):
    pytest.importorskip("matplotlib")
    write_report(tmp_path, proof, history, config, plots=True)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for words in ("| accuracy |", "## Calibration", "confident", "**missed**", "## Reload", "`nkd`", "gamma=1e-05"):
        assert words in text
    plots = sorted((tmp_path / "plots").iterdir())
    assert [path.name for path in plots] == ["loss.png", "quality_size.png", "reliability.png"]
    first = [path.read_bytes() for path in plots]
    assert all(content.startswith(b"\x89PNG") and len(content) > 5000 for content in first)
    assert all(f"(plots/{path.name})" in text for path in plots)
    write_report(tmp_path, proof, history, config, plots=True)
    assert [path.read_bytes() for path in plots] == first


def test_figures_of_generated_texts_have_a_plot_of_their_own(tmp_path, config, proof, history):
    pytest.importorskip("matplotlib")
    write_report(tmp_path / "before", proof, history, config, plots=True)
    for entry in history[::2]:
        entry["parts"] |= {"acceptance": 0.5, "teacher log-likelihood": -2.0}
    write_report(tmp_path, proof, history, config, plots=True)
    assert "(plots/texts.png)" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "plots" / "texts.png").is_file()
    losses = [(folder / "plots" / "loss.png").read_bytes() for folder in (tmp_path, tmp_path / "before")]
    assert losses[0] == losses[1], "they are no losses"


def test_report_with_little_to_show(tmp_path, config, proof):
    proof.student.reliability = None
    config.command = "evaluate"
    write_report(tmp_path, Proof(proof.student), [], config, plots=True)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| metric | model |" in text
    assert "## Plots" not in text
    assert not (tmp_path / "plots").exists()


def test_broken_training_still_gets_a_plot(tmp_path, config, proof, history):
    pytest.importorskip("matplotlib")
    history[5]["loss"] = math.nan
    history[6]["parts"] = {"kd": math.inf}
    del history[7]["lr"]
    proof.teacher.bytes = proof.student.bytes
    write_report(tmp_path, proof, history, config, plots=True)
    assert (tmp_path / "plots" / "loss.png").is_file()


def test_without_matplotlib_the_report_says_how_to_get_plots(tmp_path, config, proof, history, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else found(name, *a))
    write_report(tmp_path, proof, history, config, plots=True)
    assert "kdtool[plots]" in (tmp_path / "report.md").read_text(encoding="utf-8")
