"""Runs of the real command line: as processes where that matters, in this process where it does not."""

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kdtool.cli import app
from tests.cli.conftest import clean_environment

QUICK = ["--set", "eval.latency=false", "--set", "eval.reload=false", "--set", "output.plots=false"]
"""Leaves out what takes long and is shown elsewhere."""


@dataclass
class Outcome:
    """How a run of the command line ended."""

    code: int
    out: str
    err: str

    @property
    def answer(self) -> Any:
        """The one JSON object of standard output."""
        return json.loads(self.out)

    @property
    def problem(self) -> str:
        """The line that says what went wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0].removeprefix("error: ")


def start(*args: str | Path, folder: Path, **more: Any) -> subprocess.Popen:
    """Start the command line as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "kdtool", *map(str, args)],
        env=clean_environment({"KDTOOL_CACHE": str(folder / "cache")}),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        **more,
    )


def wait(process: subprocess.Popen) -> Outcome:
    out, err = process.communicate(timeout=300)
    return Outcome(process.returncode, out, err)


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """`cli(ARGUMENTS)`: run the command line in this process, as `main` does."""

    def call(*args: str | Path) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        before, own = dict(os.environ), clean_environment({"KDTOOL_CACHE": str(tmp_path / "cache")})
        monkeypatch.chdir(tmp_path)
        try:
            os.environ.clear()
            os.environ.update(own)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
                code = app.run([str(arg) for arg in args])
        finally:
            os.environ.clear()
            os.environ.update(before)
        return Outcome(code, out.getvalue(), err.getvalue())

    return call


MODALITIES = {
    "pairs": ("bert", "layers:2", ["--json", "--set", "eval.latency_batches=[1,4]"]),
    "images": ("resnet", None, ["-q", "--set", "eval.latency=false", "--set", "output.plots=false"]),
    "audio": ("wav2vec", "layers:1", ["--set", "eval.latency=false", "--set", "output.plots=false"]),
    "plain": ("llama", "layers:2", ["--set", "data.max_length=16", "--set", "eval.latency=false"]),
}
"""Data to teacher, student (None: the tiny ViT) and options."""


@dataclass
class Distilled:
    """A finished run and what it was made from."""

    outcome: Outcome
    folder: Path
    teacher: Path
    data: Path

    @property
    def manifest(self) -> Any:
        return json.loads((self.folder / "kdtool.json").read_text())


@pytest.fixture(scope="session")
def distilled(models, data, tmp_path_factory):
    """`distilled[NAME]`: kdtool distill on pairs, images, audio and plain text, each a real process."""
    root = tmp_path_factory.mktemp("distilled")
    running = {}
    for name, (teacher, student, options) in MODALITIES.items():
        chosen = student or models("vit-small")
        arguments = ["distill", models(teacher), "--student", chosen, "--method", "kd", "--data", data(name)]
        arguments += ["--max-steps", "3", "--batch-size", "4", "--set", "eval.latency_repeats=2", "-o", root / name]
        running[name] = start(*arguments, *options, folder=root)
        if len(running) % 2 == 0:
            # two at a time: each needs several hundred megabytes
            for process in running.values():
                process.wait(timeout=300)
    return {
        name: Distilled(wait(process), root / name, models(MODALITIES[name][0]), data(name))
        for name, process in running.items()
    }
