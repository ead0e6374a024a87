"""Runs of the real command line: as processes where that matters, in this process where it does not."""

import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import clean_environment, run_here

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
    out, err = process.communicate(timeout=900)
    return Outcome(process.returncode, out, err)


def call(*args: str | Path, folder: Path) -> Outcome:
    """Run the command line in this process."""
    done = run_here(*args, folder=folder, env={"KDTOOL_CACHE": str(folder / "cache")})
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def cli(tmp_path):
    """`cli(ARGUMENTS)`: run the command line in this process, in an empty folder."""
    return functools.partial(call, folder=tmp_path)


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
    """`distilled[NAME]`: kdtool distill on pairs, as a real process, on images, audio and plain text."""
    root = tmp_path_factory.mktemp("distilled")
    made = {}
    for name, (teacher, student, options) in MODALITIES.items():
        chosen = student or models("vit-small")
        arguments = ["distill", models(teacher), "--student", chosen, "--method", "kd", "--data", data(name)]
        arguments += ["--max-steps", "3", "--batch-size", "4", "--set", "eval.latency_repeats=2", "-o", root / name]
        run = call if made else lambda *words, folder: wait(start(*words, folder=folder))
        made[name] = Distilled(run(*arguments, *options, folder=root), root / name, models(teacher), data(name))
    return made
