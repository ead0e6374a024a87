"""From teacher and data to a documented student, through the real command line."""

import hashlib
import json
import shutil

import pytest
import torch
import transformers

from kdtool import load
from tests import tiny
from tests.pipelines.conftest import MODALITIES, QUICK


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", MODALITIES)
def test_makes_a_complete_folder(distilled, name):
    run = distilled[name]
    assert run.outcome.code == 0, run.outcome.err
    assert "Traceback" not in run.outcome.err
    found = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*") if path.is_file()}
    processor = "preprocessor_config.json" if name in ("images", "audio") else "tokenizer.json"
    assert {"model.safetensors", "config.json", "README.md", "kdtool.json", "report.md", processor} <= found
    assert not any(path.startswith(".") for path in found)
    files = run.manifest["files"]
    assert set(files) == found - {"kdtool.json"}
    assert all(files[path]["sha256"] == digest(run.folder / path) for path in files)


@pytest.mark.parametrize("name", MODALITIES)
def test_the_saved_student_reproduces_itself_in_a_fresh_process(distilled, name):
    reload = distilled[name].manifest["reload"]
    assert reload["passed"]
    assert reload["max_abs_diff"] <= reload["tolerance"]
    assert reload["examples"] > 0


@pytest.mark.parametrize("name", MODALITIES)
def test_loads_with_plain_transformers_and_with_kdtool(distilled, name):
    run = distilled[name]
    task = run.manifest["task"]
    auto = {
        "text-classification": "AutoModelForSequenceClassification",
        "image-classification": "AutoModelForImageClassification",
        "audio-classification": "AutoModelForAudioClassification",
        "causal-lm": "AutoModelForCausalLM",
    }[task]
    plain = getattr(transformers, auto).from_pretrained(run.folder)
    own = load(run.folder)
    assert type(own) is type(plain)
    assert all(torch.equal(tensor, plain.state_dict()[key]) for key, tensor in own.state_dict().items())
    if task != "causal-lm":
        assert own.config.id2label == dict(enumerate(tiny.LABELS))


def test_json_is_one_object_with_the_promised_keys(distilled):
    answer = distilled["pairs"].outcome.answer
    assert answer["schema"] == 1
    assert answer["command"] == "distill"
    assert answer["output"] == str(distilled["pairs"].folder)
    assert answer["steps"] == 3
    assert answer["seconds"] > 0
    assert answer["gates"] == []
    student, teacher = answer["metrics"]["student"], answer["metrics"]["teacher"]
    assert student.keys() == teacher.keys() >= {"accuracy", "nll"}
    assert answer["metrics"]["retention"]["nll"] == pytest.approx(teacher["nll"] / student["nll"])
    assert 0 < answer["model"]["parameters"] < answer["teacher"]["parameters"]
    assert answer["model"]["bytes"] == (distilled["pairs"].folder / "model.safetensors").stat().st_size
    assert set(answer["latency"]["student"]) == {"1", "4"}


def test_quiet_prints_the_path_alone(distilled):
    run = distilled["images"]
    assert run.outcome.out == f"{run.folder}\n"
    assert run.outcome.err == ""


def test_people_read_what_was_made_where_how_good_and_what_next(distilled):
    out = distilled["audio"].outcome.out
    last = out.splitlines()[-3:]
    assert last[0].startswith(f"distilled: {distilled['audio'].folder} (")
    assert last[1].startswith("quality: accuracy ")
    assert last[2].startswith("next: kdtool export ")
    assert "| accuracy" in out


def test_card_and_report_name_models_data_and_numbers(distilled):
    run = distilled["pairs"]
    card, report = ((run.folder / name).read_text() for name in ("README.md", "report.md"))
    accuracy = run.outcome.answer["metrics"]["student"]["accuracy"]
    assert f"{accuracy:.4f}" in report
    assert "model-index" in card
    assert "kdtool distill" in card
    assert str(run.teacher) in report or run.teacher.name in report


@pytest.mark.parametrize("name", ["pairs", "plain"])
def test_the_manifest_repeats_the_run_bit_for_bit(distilled, name, cli, tmp_path):
    run = distilled[name]
    again = cli("distill", "-c", run.folder / "kdtool.json", "-o", tmp_path / "again", *QUICK)
    assert again.code == 0, again.err
    assert digest(tmp_path / "again" / "model.safetensors") == digest(run.folder / "model.safetensors")
    metrics = json.loads((tmp_path / "again" / "kdtool.json").read_text())["metrics"]
    assert metrics["student"] == pytest.approx(run.manifest["metrics"]["student"])
    other = cli("distill", "-c", run.folder / "kdtool.json", "-o", tmp_path / "other", "--seed", "1", *QUICK)
    assert other.code == 0, other.err
    assert digest(tmp_path / "other" / "model.safetensors") != digest(run.folder / "model.safetensors")


@pytest.mark.parametrize("name", MODALITIES)
def test_evaluate_agrees_with_the_report(distilled, name, cli):
    run = distilled[name]
    options = ["--set", "data.max_length=16"] if name == "plain" else []
    arguments = ["evaluate", run.folder, "--teacher", run.teacher, "--data", run.data, "--json", *options]
    found = cli(*arguments, "--set", "eval.latency=false")
    assert found.code == 0, found.err
    for side in ("student", "teacher"):
        assert found.answer["metrics"][side] == pytest.approx(run.manifest["metrics"][side], rel=1e-5), side


def test_evaluate_quietly_prints_the_main_number(distilled, cli):
    run = distilled["pairs"]
    found = cli(
        "evaluate", run.folder, "--data", run.data, "-q", "--metrics", "nll,accuracy", "--set", "eval.latency=false"
    )
    assert found.code == 0, found.err
    assert float(found.out) == pytest.approx(run.manifest["metrics"]["student"]["nll"], rel=1e-4)
    assert found.err == ""


def test_export_halves_the_weights_and_is_checked(distilled, cli, tmp_path):
    run = distilled["plain"]
    found = cli(
        "export", run.folder, "--format", "safetensors", "--set", "output.dtype=float16", "-o", "half", "--json"
    )
    assert found.code == 0, found.err
    whole, half = (folder / "model.safetensors" for folder in (run.folder, tmp_path / "half"))
    assert half.stat().st_size < 0.7 * whole.stat().st_size
    assert found.answer["reload"]["passed"]
    assert 0 < found.answer["reload"]["max_abs_diff"] < 0.1
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"


def test_a_missed_gate_exits_3_and_keeps_the_result(distilled, cli, tmp_path):
    run = distilled["pairs"]
    gates = ["--fail-under", "accuracy=0.999", "--fail-under", "nll.retention=0.01"]
    found = cli("distill", "-c", run.folder / "kdtool.json", "-o", "kept", "--json", *gates, *QUICK)
    assert found.code == 3
    assert "accuracy" in found.problem
    assert "kept" in found.err
    assert "nll" not in found.problem
    assert [gate["passed"] for gate in found.answer["gates"]] == [False, True]
    assert digest(tmp_path / "kept" / "model.safetensors") == digest(run.folder / "model.safetensors")
    assert not (tmp_path / "kept" / ".kdtool").exists()


def test_an_output_in_use_is_refused_before_any_work(distilled, cli):
    run = distilled["pairs"]
    before = digest(run.folder / "model.safetensors")
    for arguments in (["-c", run.folder / "kdtool.json"], ["-c", run.folder / "kdtool.json", "-o", run.folder]):
        found = cli("distill", *arguments)
        assert found.code == 2
        assert "is not empty" in found.problem
        assert "--overwrite" in found.err
    assert digest(run.folder / "model.safetensors") == before


def test_overwrite_replaces_the_result_alone(distilled, cli, tmp_path):
    run = distilled["pairs"]
    shutil.copytree(run.folder, tmp_path / "old")
    (tmp_path / "old" / "notes.txt").write_text("mine")
    (tmp_path / "old" / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    found = cli("distill", "-c", run.folder / "kdtool.json", "-o", "old", "--seed", "1", "--overwrite", *QUICK)
    assert found.code == 0, found.err
    assert digest(tmp_path / "old" / "model.safetensors") != digest(run.folder / "model.safetensors")
    assert (tmp_path / "old" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "old" / "model-00001-of-00002.safetensors").exists()


def test_a_dry_run_loads_nothing_and_writes_nothing(distilled, cli, tmp_path):
    run = distilled["pairs"]
    found = cli("distill", "-c", run.folder / "kdtool.json", "-o", "dry", "--dry-run", "--json")
    assert found.code == 0, found.err
    plan = found.answer["plan"]
    assert plan["student"]["parameters"] == run.outcome.answer["model"]["parameters"]
    assert plan["teacher"]["parameters"] == run.outcome.answer["teacher"]["parameters"]
    assert plan["training"]["steps"] == 3
    assert plan["data"]["rows"] == {"train": 30, "test": 12}
    assert not (tmp_path / "dry").exists()


def test_fine_tuned_teachers_come_from_the_cache_the_second_time(models, data, cli, tmp_path):
    # a student without its head: the classes are those of the data
    arguments = ["distill", models("bert"), "--student", "layers:1", "--method", "kd", "--data", data("text")]
    arguments += ["--fine-tune-teacher", "--set", "teacher.fine_tune_epochs=1", "--max-steps", "2", *QUICK]
    first, second = (cli(*arguments, "-o", name) for name in ("one", "two"))
    assert first.code == second.code == 0, first.err + second.err
    assert "fine-tuning the teacher on 30 rows" in first.err
    assert "taken from the cache" in second.err
    assert digest(tmp_path / "one" / "model.safetensors") == digest(tmp_path / "two" / "model.safetensors")
