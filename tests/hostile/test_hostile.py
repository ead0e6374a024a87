"""Hostile input: each gives one clear line and the documented exit code, and nothing outside the output folder."""

import json
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from kdtool.config import load_config
from kdtool.errors import KdtoolError
from kdtool.models import load_model
from kdtool.run import Run

AUTO = "AutoModelForSequenceClassification"


def kdtool(*arguments, cwd):
    """The real command line, with memory bounded to what a small model needs."""

    def bound():
        resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))

    return subprocess.run(
        [sys.executable, "-m", "kdtool", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        preexec_fn=bound,
        check=False,
    )


@pytest.fixture
def model(models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models("bert"), folder)
    return folder


def refused(call, *words):
    """The one line of a refusal."""
    with pytest.raises(KdtoolError) as caught:
        call()
    problem = caught.value
    line = f"{problem.message} {problem.why or ''} {problem.hint or ''}"
    assert "\n" not in problem.message
    assert len(line) < 1500, "a message must not repeat the input"
    assert any(word in line for word in words), line
    return problem


# Weights


def header(path, entries, size=16):
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * size)


LYING = {
    "a header longer than the file": lambda p: p.write_bytes(struct.pack("<Q", 2**60) + b"{}"),
    "a header that is no JSON": lambda p: p.write_bytes(struct.pack("<Q", 4) + b"\xff\xfe{}" + b"\0" * 8),
    "offsets beyond the file": lambda p: header(
        p, {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ),
    "a shape that does not fit its bytes": lambda p: header(
        p, {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}
    ),
    "overlapping tensors": lambda p: header(
        p,
        {
            "x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "y": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        },
    ),
    "a product of sizes that overflows": lambda p: header(
        p, {"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}
    ),
    "an empty file": lambda p: p.write_bytes(b""),
}


@pytest.mark.parametrize("lie", LYING)
def test_safetensors_that_lie_are_refused(lie, model):
    LYING[lie](model / "model.safetensors")
    refused(lambda: load_model(str(model), AUTO, Run(offline=True)), "damaged")


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("allowed", [False, True])
def test_pickle_never_runs_code(allowed, model, tmp_path):
    (model / "model.safetensors").unlink()
    trace = tmp_path / "it-ran"
    with (model / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"x": _Evil(trace)}, file, protocol=2)
    refused(lambda: load_model(str(model), AUTO, Run(offline=True, allow_pickle=allowed)), "pickle")
    assert not trace.exists()


def test_remote_code_is_refused_by_name(model, tmp_path):
    trace = tmp_path / "it-ran"
    (model / "own.py").write_text(f"open({str(trace)!r}, 'w')\n")
    values = json.loads((model / "config.json").read_text())
    values |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "own.C", AUTO: "own.M"}}
    (model / "config.json").write_text(json.dumps(values))
    refused(lambda: load_model(str(model), AUTO, Run(offline=True)), "--trust-remote-code")
    assert not trace.exists()


def test_index_cannot_name_files_outside_the_folder(model, tmp_path):
    shutil.copy(model / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"classifier.weight": "../elsewhere.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: load_model(str(model), AUTO, Run(offline=True)), "outside", "leaves")


@pytest.mark.parametrize("text", ["[]", "[1", "\x00", '{"weight_map": 3}', '{"weight_map": {"a": 7}}', "{}"])
def test_damaged_index_is_one_line(text, model):
    (model / "model.safetensors.index.json").write_text(text)
    refused(lambda: load_model(str(model), AUTO, Run(offline=True)), "index")


# Configurations

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "train: &t\n  more: *t\n",
        "method: !!python/object/apply:os.system ['touch it-ran']\n",
        "method: !!python/name:os.system\n",
        "? [a, b]\n: 1\n",
        "- 1\n- 2\n",
        "\x00\x01",
        "{" * 5000,
        "train: {lr: 1e999999}\n",
        "train: {epochs: .nan}\n",
        "runtime: {seed: -1}\n",
        "teacher: {model: '" + "x" * 10**6 + "'}\ntrain: {lr: no}\n",
    ],
    ids=["bomb", "cycle", "apply", "name", "key", "list", "nul", "deep", "huge", "nan", "seed", "long"],
)
def test_configurations_are_refused_in_one_line(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(text)
    problem = refused(lambda: load_config("distill", path), "")
    assert problem.exit_code == 2
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method.name", "../../evil"),
        ("output.format", "../x"),
        ("data.task", "../../x"),
        ("eval.benchmark", "../../../etc/passwd"),
        ("data.source", "../\x00"),
        ("teacher.model", "package:os/../../../etc"),
        ("student.model", "package:../x/y"),
        ("teacher.model", "a\x00b"),
        ("output.folder", "\x00"),
    ],
)
def test_names_cannot_leave_their_folder(key, value, models, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from kdtool.pipelines import distill

    def go():
        options = {
            "teacher.model": str(models("bert")),
            "student.model": "layers:1",
            "data.source": str(data("text")),
            "output.folder": str(tmp_path / "out"),
            "method.name": "kd",
            "train.max_steps": 1,
            "runtime.offline": True,
        }
        config = load_config("distill", None, [], options | {key: value})
        if key == "output.format":
            config = load_config("export", None, [], {"teacher.model": str(models("bert")), key: value})
        distill(config)

    assert refused(go, "").exit_code in (2, 4)
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}


# Data


def rows(folder, lines):
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run_on(source, models, folder, **options):
    from kdtool.pipelines import distill

    values = {
        "teacher.model": str(models("bert")),
        "student.model": "layers:1",
        "data.source": str(source),
        "data.task": "text-classification",
        "output.folder": str(folder),
        "method.name": "kd",
        "train.max_steps": 1,
        "eval.latency": False,
        "eval.reload": False,
        "output.plots": False,
        "runtime.offline": True,
    }
    return distill(load_config("distill", None, [], values | options))


def test_strange_text_is_trained_on(models, tmp_path):
    labels = ["bad", "so so", "good"]
    strange = ["\x00\x1b[31m\u202e", "x" * 10**6, "", " ", "\ud83d\ude00" * 1000, "a\nb\tc", "\ufeff", "<s>" * 50]
    lines = [{"text": text, "label": labels[i % 3]} for i, text in enumerate(strange * 2)]
    result = run_on(rows(tmp_path / "data", lines), models, tmp_path / "out")
    assert result.proof.student.metrics
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out"}


@pytest.mark.parametrize(
    "label", ["", "x" * 10**6, 10**30, -1, 1.5, None, ["bad"], {"a": 1}], ids=lambda v: str(v)[:6] or "empty"
)
def test_strange_labels_are_refused(label, models, tmp_path):
    lines = [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}, {"text": "c", "label": label}]
    problem = refused(lambda: run_on(rows(tmp_path / "data", lines), models, tmp_path / "out"), "label", "class")
    assert problem.exit_code == 2


@pytest.mark.parametrize(
    "text",
    ["", "\x00" * 100, "[1, 2]\n", "{", '{"text": 3, "label": "good"}\n', "[" * 10**5],
    ids=["empty", "nul", "list", "cut", "number", "deep"],
)
def test_damaged_files_are_refused(text, models, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(text)
    assert refused(lambda: run_on(folder, models, tmp_path / "out"), "").exit_code == 2


def bomb(path, side):
    """A PNG of side x side black pixels, a thousandth of their size."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    squeezed = zlib.compress(b"\0" * (2**20), 9)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", squeezed)
        + chunk(b"IEND", b"")
    )


def test_an_image_that_unpacks_to_gigabytes_is_refused(models, tmp_path):
    from PIL import Image

    for label in ("bad", "good", "so so"):
        folder = tmp_path / "images" / "train" / label
        folder.mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    bomb(tmp_path / "images" / "train" / "good" / "big.png", 60_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = refused(
        lambda: run_on(
            tmp_path / "images",
            models,
            tmp_path / "out",
            **{"teacher.model": str(models("vit")), "data.task": "image-classification"},
        ),
        "pixels",
        "decoded",
    )
    assert done.exit_code == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "kilobytes"


def test_media_paths_cannot_leave_the_data_folder(models, tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "outside.png")
    options = {"teacher.model": str(models("vit")), "data.task": "image-classification"}
    for name in ("../outside.png", "link.png", "/etc/hostname"):
        rows(tmp_path / "data", [{"image": name, "label": label} for label in ("bad", "good", "so so")])
        problem = refused(lambda: run_on(tmp_path / "data", models, tmp_path / "out", **options), "folder", "outside")
        assert problem.exit_code == 2


def test_the_command_line_says_one_line_and_leaves_no_trace(model, data, tmp_path):
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    done = kdtool(
        "distill", model, "--student", "layers:1", "--method", "kd", "--data", data("text"), "-o", "out", cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 5, done.stderr
    assert "damaged" in done.stderr
    assert not (tmp_path / "out").exists()
