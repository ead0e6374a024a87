import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pytest

from tests import tiny
from tests.cli.conftest import clean_environment

DRIVER = Path(__file__).with_name("driver.py")
QUICK = ["--set", "eval.latency=false", "--set", "eval.reload=false", "--set", "output.plots=false"]
STEPS = 6


@dataclass
class Ended:
    """How a forked command ended: its exit code, or the signal that killed it."""

    code: int | None
    signal: int | None
    text: str
    events: list[str]


class Driver:
    """Talks to driver.py."""

    def __init__(self, root: Path, first: list[str]) -> None:
        self.root = root
        with (root / "warm").open("w") as said:
            self.process = self._start(said)
        assert self._ask({"argv": [*first, "-o", str(root / "first")]}) == {"code": 0}, (root / "warm").read_text()

    def _start(self, said: TextIO) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(DRIVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            cwd=self.root,
            env=clean_environment({"KDTOOL_CACHE": str(self.root / "cache")}),
        )

    def _ask(self, job: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def run(self, *argv: str | Path, event: int | None = None, signal: str = "KILL") -> Ended:
        """Run a command, stopped before event number `event` if one is given."""
        log, trace = self.root / "log", self.root / "trace"
        trace.unlink(missing_ok=True)
        job = {"argv": [str(word) for word in argv], "log": str(log), "trace": str(trace)}
        if event is not None:
            job["stop"] = {"event": event, "signal": signal}
        answer = self._ask(job)
        events = json.loads(trace.read_text()) if trace.is_file() else []
        return Ended(answer.get("code"), answer.get("signal"), log.read_text(), events)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@pytest.fixture(scope="session")
def command(models, tmp_path_factory):
    """The command without its output folder: `command(METHOD)`."""
    # more rows than fit into a chunk of the teacher cache
    rows = tiny.text_data(tmp_path_factory.mktemp("rows"), train=100)

    def make(method: str = "kd") -> list[str]:
        given = ["distill", models("bert"), "--student", "layers:2", "--method", method, "--data", rows]
        given += ["--max-steps", STEPS, "--batch-size", "4", "--set", "train.checkpoint_every=1"]
        given += ["--set", "train.log_every=4", "--set", "train.teacher_cache=true", *QUICK]
        return [str(word) for word in given]

    return make


@pytest.fixture(scope="session")
def driver(tmp_path_factory, command):
    running = Driver(tmp_path_factory.mktemp("driver"), command())
    yield running
    running.close()


@dataclass
class Unbroken:
    """A run that nothing disturbed."""

    weights: bytes
    history: list[dict[str, float]]
    metrics: dict[str, Any]
    events: list[str]


def read(folder: Path, events: list[str]) -> Unbroken:
    manifest = json.loads((folder / "kdtool.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    return Unbroken(weights, manifest["history"], manifest["metrics"], events)


@pytest.fixture(scope="session")
def unbroken(driver, command, tmp_path_factory):
    """`unbroken(METHOD)`: the run that all others must equal."""
    found: dict[str, Unbroken] = {}

    def make(method: str = "kd") -> Unbroken:
        if method not in found:
            folder = tmp_path_factory.mktemp("unbroken") / "out"
            ended = driver.run(*command(method), "-o", folder)
            assert ended.code == 0, ended.text
            found[method] = read(folder, ended.events)
        return found[method]

    return make
