"""What users get wrong, through the real command line: the exit code, one clear line, no traceback."""

import json
import os
import resource
import shutil
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests import tiny
from tests.pipelines.conftest import QUICK, start, wait


@pytest.fixture
def fails(cli, tmp_path):
    """`fails(CODE, PARTS, ARGUMENTS)`: the run must end so, its message hold the parts, and leave nothing."""

    def call(code, parts, *arguments):
        found = cli(*arguments)
        assert found.code == code, found.err + found.out
        assert "Traceback" not in found.err
        assert found.out == ""
        for part in parts:
            assert part in found.err, found.err
        lines = found.err.splitlines()
        assert len(found.problem) < 300
        assert sum(line.startswith("Hint: ") for line in lines) <= 1
        assert not (tmp_path / "out").exists(), "the output folder is left behind"
        return found

    return call


@pytest.fixture
def command(models, data):
    """A command that would work, with parts to replace."""

    def make(**changes):
        parts = {"student": "layers:2", "method": "kd", "data": data("text"), "output": "out"} | changes
        teacher = parts.pop("teacher", models("bert"))
        rest = parts.pop("rest", [])
        flags = [str(word) for name, value in parts.items() for word in (f"--{name}", value)]
        return ["distill", str(teacher), *flags, "--max-steps", "1", "--batch-size", "4", *QUICK, *rest]

    return make


def test_the_command_works(command, cli):
    assert cli(*command()).code == 0


def test_a_teacher_cache_needs_a_folder_of_its_own(fails, command):
    fails(2, ["is the folder of the teacher cache"], *command(rest=["--teacher-cache", "./out"]))


# Names


def test_unknown_method(fails, command):
    fails(2, ["unknown method 'kdd'", "did you mean kd", "kdtool methods ls"], *command(method="kdd"))


def test_unknown_method_setting(fails, command):
    rest = ["--set", "method.temprature=2"]
    fails(2, ["unknown key 'method.temprature' for kd", "temperature"], *command(rest=rest))


def test_method_setting_out_of_range(fails, command):
    fails(2, ["method.temperature=-1", "greater than 0"], *command(rest=["--set", "method.temperature=-1"]))


def test_unknown_configuration_key(fails, command):
    fails(2, ["unknown key 'train.learning_rate'"], *command(rest=["--set", "train.learning_rate=1"]))


def test_unknown_configuration_key_in_a_file(fails, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("method: kd\ntrain:\n  lr: 1e-4\n  epoch: 3\n")
    fails(2, [f"{path}:4: unknown key 'train.epoch'", "epochs"], "distill", "-c", path)


def test_unknown_folder(fails, command):
    fails(2, ["teacher folder './nowhere' does not exist"], *command(teacher="./nowhere"))
    fails(2, ["student folder './nowhere' does not exist"], *command(student="./nowhere"))


def test_a_folder_that_is_no_model(fails, command, tmp_path):
    fails(2, ["is no model folder", "config.json is missing"], *command(teacher=tmp_path))


def test_unknown_data(fails, command):
    fails(2, ["data './nowhere.jsonl' does not exist"], *command(data="./nowhere.jsonl"))


def test_unknown_column(fails, command):
    fails(2, ["no column 'txet'", "text"], *command(rest=["--set", "data.text=txet"]))


def test_unknown_split(fails, command):
    fails(2, ["no split 'dev'", "test"], *command(rest=["--set", "data.test_split=dev"]))


def test_unknown_metric(fails, command):
    found = fails(2, ["unknown metric 'acuracy'", "accuracy"], *command(rest=["--metrics", "acuracy"]))
    assert "training" not in found.err, "known only after the work"


def test_a_metric_of_another_task(fails, command, models, data):
    rest = ["--metrics", "accuracy", "--set", "data.max_length=8"]
    parts = ["causal-lm has no metric 'accuracy'", "perplexity"]
    fails(2, parts, *command(teacher=models("llama"), data=data("plain"), rest=rest))


def test_gates_on_what_is_not_measured(fails, command, models):
    found = fails(2, ["does not measure mce", "accuracy"], *command(rest=["--fail-under", "mce=0.1"]))
    assert "training" not in found.err
    rest = ["--fail-under", "accuracy.retention=0.9", *QUICK]
    arguments = ["evaluate", models("bert"), "--data", command()[command().index("--data") + 1], *rest]
    fails(2, ["compares with a teacher, and the run has none"], *arguments)


def test_too_many_layers(fails, command):
    fails(2, ["the teacher has 4 layers"], *command(student="layers:5"))


def test_a_task_the_model_is_not_for(fails, command, models, data):
    fails(2, ["no column looks like 'image'", "columns: text, label"], *command(teacher=models("resnet")))


# Labels


def test_labels_the_teacher_does_not_know(fails, command, tmp_path):
    rows = [row | {"label": {"so so": "meh"}.get(row["label"], row["label"])} for row in tiny.text_rows(12, 1)]
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    found = fails(2, ["disagree on classes", "'meh'", "by-name"], *command(data=tmp_path / "rows.jsonl"))
    assert "so so" in found.problem
    by_name = ["--set", "data.label_map=by-name"]
    fails(2, ["class 'meh' of the data is unknown"], *command(data=tmp_path / "rows.jsonl", rest=by_name))


def test_permuted_labels(fails, command, models):
    fails(2, ["disagree on classes", "by-name"], *command(teacher=models("bert-permuted")))


def test_one_class(fails, command, tmp_path):
    rows = [row for row in tiny.text_rows(30, 1) if row["label"] == "good"]
    rest = ["--set", "data.labels=[bad,good,so so]"]
    fails(
        2,
        ["all 9 training rows have the class 'good'"],
        *command(data=tiny.write_rows(tmp_path / "rows.jsonl", rows), rest=rest),
    )


def test_labels_that_are_not_numbers(fails, command, tmp_path):
    labels = np.array([0.0, 1.0, 2.0, np.nan] * 5)
    table = pa.table({"text": [row["text"] for row in tiny.text_rows(20, 1)], "label": labels})
    pq.write_table(table, tmp_path / "rows.parquet")
    fails(2, ["5 of 20 labels are missing", "row 4"], *command(data=tmp_path / "rows.parquet"))


def test_ids_out_of_range(fails, command, tmp_path):
    rows = [row | {"label": i % 3 + 1} for i, row in enumerate(tiny.text_rows(20, 1, names=False))]
    rest = ["--set", "data.labels=[bad,good,so so]"]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    fails(2, ["label id 3", "out of range"], *command(data=path, rest=rest))


# Broken files


def test_an_empty_file(fails, command, tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    fails(2, ["rows.jsonl", "empty"], *command(data=tmp_path / "rows.jsonl"))


def test_corrupt_parquet(fails, command, tmp_path):
    pq.write_table(pa.table({"text": ["a"] * 50, "label": [0, 1] * 25}), tmp_path / "rows.parquet")
    content = (tmp_path / "rows.parquet").read_bytes()
    for damaged in (content[:-20], b"PAR1" + bytes(100) + b"PAR1", b"x"):
        (tmp_path / "rows.parquet").write_bytes(damaged)
        fails(2, ["rows.parquet", "cannot be read"], *command(data=tmp_path / "rows.parquet"))


def test_corrupt_jsonl(fails, command, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label"\n')
    fails(2, ["rows.jsonl", "2"], *command(data=tmp_path / "rows.jsonl"))


@pytest.fixture
def broken(models, tmp_path):
    """A copy of the teacher to damage."""
    return shutil.copytree(models("bert"), tmp_path / "broken")


def test_corrupt_safetensors(fails, command, broken):
    path = broken / "model.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-100], whole[:50], b"", bytes(64)):
        path.write_bytes(content)
        fails(2, ["weights of", "are damaged", "copy or download"], *command(teacher=broken))


def test_weights_of_another_architecture(fails, command, broken, models):
    shutil.copy(models("llama") / "model.safetensors", broken / "model.safetensors")
    fails(2, ["has no trained head", "--fine-tune-teacher"], *command(teacher=broken))


def test_pickle_weights(fails, command, broken, cli):
    from safetensors.torch import load_file

    state = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    torch.save(state, broken / "pytorch_model.bin")
    fails(2, ["only pickle weights", "--allow-pickle"], *command(teacher=broken))
    assert cli(*command(teacher=broken, rest=["--allow-pickle"])).code == 0


class Touches:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickle_that_runs_code_is_refused_even_if_allowed(fails, command, broken, tmp_path):
    (broken / "model.safetensors").unlink()
    torch.save({"x": Touches(str(tmp_path / "trace"))}, broken / "pytorch_model.bin")
    fails(2, ["hold more than tensors"], *command(teacher=broken, rest=["--allow-pickle"]))
    assert not (tmp_path / "trace").exists()


def test_no_weights(fails, command, broken):
    (broken / "model.safetensors").unlink()
    fails(2, ["holds no weights"], *command(teacher=broken))


def test_damaged_configuration_of_a_model(fails, command, broken):
    (broken / "config.json").write_text("{")
    fails(2, ["config.json of", "is damaged"], *command(teacher=broken))
    (broken / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    fails(2, [], *command(teacher=broken, rest=["--task", "text-classification"]))


def test_missing_tokenizer(fails, command, broken):
    for path in broken.glob("tokenizer*"):
        path.unlink()
    fails(2, ["has no processor files", "tokenizer.json"], *command(teacher=broken))


def test_damaged_tokenizer(fails, command, broken):
    (broken / "tokenizer.json").write_text("{")
    fails(2, ["broken"], *command(teacher=broken))


def test_missing_image_processor(fails, command, models, data, tmp_path):
    folder = shutil.copytree(models("vit"), tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()
    fails(2, ["has no processor files", "preprocessor_config.json"], *command(teacher=folder, data=data("images")))


def test_a_damaged_image(fails, command, models, data, tmp_path):
    folder = shutil.copytree(data("images"), tmp_path / "pictures")
    (folder / "train" / "good" / "3.png").write_bytes(b"no picture")
    fails(2, ["cannot be decoded", "row 10"], *command(teacher=models("vit"), data=folder))


# The place


def test_offline_with_nothing_cached(fails, command, tmp_path):
    rest = ["--offline", "--cache-dir", tmp_path / "empty"]
    fails(4, ["'owner/name' cannot be had", "offline, and nothing cached"], *command(teacher="owner/name", rest=rest))
    fails(4, ["owner/rows", "offline"], *command(data="owner/rows", rest=rest))


def test_output_in_use(command, cli, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    found = cli(*command())
    assert found.code == 2
    assert "is not empty" in found.problem
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_output_that_is_a_file(command, cli, tmp_path):
    (tmp_path / "out").write_text("mine")
    found = cli(*command())
    assert found.code == 2
    assert "is a file" in found.problem


def test_output_around_an_input(command, cli, broken, tmp_path):
    found = cli(*command(teacher=broken, output=broken, rest=["--overwrite"]))
    assert found.code == 2
    assert "holds the teacher" in found.problem
    assert (broken / "model.safetensors").is_file()


def test_no_permission(fails, command):
    found = fails(1, [], *command(output="/proc/out"))
    assert "/proc/out" in found.err
    assert "with -o" in found.err


@pytest.fixture
def small_disk(tmp_path):
    """A file system with 40 kB of space; a limit on file sizes will not do for a real ENOSPC."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting a small file system needs more rights")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_full(command, cli, small_disk):
    found = cli(*command(output=small_disk / "out"))
    assert found.code == 1, found.err
    assert "Traceback" not in found.err
    assert "no space" in found.err.lower()
    assert "-o" in found.err
    assert not (small_disk / "out" / "config.json").exists(), "a half-written result"


def test_models_of_another_kind(fails, command, models):
    fails(2, ["is no model for this task", "--task"], *command(student=models("vit")))


def test_file_size_limit(command, tmp_path):
    """As a process: the limit holds for all of it."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))  # noqa: E731
    found = wait(start(*command(), folder=tmp_path, preexec_fn=limit))
    assert found.code == 1, found.err
    assert "Traceback" not in found.err
    assert "as large as it has to" in found.problem


def test_json_errors_are_one_object(command, cli):
    found = cli(*command(method="kdd", rest=["--json"]))
    assert found.code == 2
    assert found.answer["schema"] == 1
    assert found.answer["error"]["code"] == "usage"
    assert "kdd" in found.answer["error"]["message"]
    assert found.answer["error"]["hint"]
