"""Every exception has an exit code, one line what, and where possible a way out."""

import builtins
import errno
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import kdtool
from kdtool.cli import app
from kdtool.cli.failures import explain
from kdtool.cli.session import Session
from kdtool.config import load_config
from kdtool.errors import TrainingProblem


def hub_error(name: str) -> Exception:
    """An exception that says it comes from the Hub's client."""
    made = type(name, (Exception,), {"__module__": "huggingface_hub.errors"})
    return made("404 Client Error.\nmore lines")


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


def wrapped(inner: BaseException) -> OSError:
    """As transformers wraps what the Hub says."""
    outer = OSError("cannot load")
    outer.__cause__ = inner
    return outer


CASES: dict[str, tuple[BaseException, int, str, str, str]] = {
    "own": (TrainingProblem("loss is nan"), 1, "training", "loss is nan", ""),
    "interrupt": (KeyboardInterrupt(), 130, "interrupted", "interrupted", ""),
    "memory": (MemoryError(), 5, "memory", "out of memory", "--dtype bfloat16"),
    "cuda": (OutOfMemoryError("CUDA out of memory"), 5, "memory", "out of memory", "max_length"),
    "cpu": (
        RuntimeError("[enforce fail at x] DefaultCPUAllocator: can't allocate memory: you tried"),
        5, "memory", "out of memory", "batch",
    ),
    "fork": (OSError(errno.ENOMEM, "Cannot allocate memory"), 5, "memory", "out of memory", "batch"),
    "disk": (OSError(errno.ENOSPC, "No space left", "/out/x"), 1, "output", "no space left on the device: /out/x", ""),
    "safetensors": (Exception("I/O error: No space left on device (os error 28)"), 1, "output", "no space left", "-o"),
    "permission": (PermissionError(errno.EACCES, "x", "/out"), 1, "output", "permission denied: /out", "-o"),
    "read-only": (OSError(errno.EROFS, "x", "/out"), 1, "output", "read-only file system", "-o"),
    "not found": (hub_error("RepositoryNotFoundError"), 4, "hub", "the Hub could not be used", "--token"),
    "gated": (hub_error("GatedRepoError"), 4, "hub", "the Hub could not be used", "accept the terms"),
    "offline": (hub_error("OfflineModeIsEnabled"), 4, "hub", "the Hub could not be used", "--offline"),
    "wrapped": (wrapped(hub_error("LocalEntryNotFoundError")), 4, "hub", "the Hub could not be used", "--offline"),
    "other hub": (hub_error("HfHubHTTPError"), 4, "hub", "the Hub could not be used", "run again"),
    "cut": (ConnectionResetError("reset by peer"), 4, "hub", "the network could not be used", "run again"),
    "unexpected": (ValueError("odd"), 1, "unexpected", "unexpected ValueError: odd", "KDTOOL_DEBUG=1"),
    "without words": (KeyError(), 1, "unexpected", "unexpected KeyError", "KDTOOL_DEBUG=1"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_explain(case: str) -> None:
    error, code, word, message, hint = CASES[case]
    found = explain(error, Session.begin([], {}))
    assert (found.exit_code, found.code) == (code, word)
    assert message in found.message
    assert hint in (found.hint or "")
    assert "\n" not in found.message + (found.why or "")


def test_memory_hint_fits_the_run() -> None:
    session = Session.begin([], {})
    session.config = load_config("distill", options={"train.batch_size": 32, "train.grad_accum": 2})
    hint = explain(MemoryError(), session).hint
    assert hint is not None
    assert "--batch-size 8 --grad-accum 8" in hint


def test_interrupt_names_the_way_back(tmp_path: Path) -> None:
    session = Session.begin([], {})
    session.config = load_config("distill", options={"output.folder": str(tmp_path)})
    assert explain(KeyboardInterrupt(), session).hint is None
    (tmp_path / ".kdtool").mkdir()
    (tmp_path / ".kdtool" / "run.json").write_text("{}")
    assert "same command again" in str(explain(KeyboardInterrupt(), session).hint)


def test_secrets_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "my-own-token")
    found = explain(ValueError("refused my-own-token and hf_abcdefghijklmn"), Session.begin([], {}))
    assert "my-own-token" not in found.message
    assert "hf_abc" not in found.message


class FakeResult:
    """What a pipeline gives back."""

    def __init__(self, **more: Any) -> None:
        self.output: Path | None = Path("out")
        self.lines = ["done: out", "next: kdtool export out"]
        self.table = [["metric", "student"], ["accuracy", "0.84"]]
        self.gates_missed: list[str] = []
        self.extra: dict[str, Any] = {}
        self.__dict__.update(more)

    def as_json(self) -> dict[str, Any]:
        metrics = {"student": {"loss": 1.5, "accuracy": 0.84}}
        return {"schema": 1, "command": "evaluate", "metrics": metrics, "main": "accuracy", "gates": self.gates_missed}


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Put a function in the place of every pipeline; nothing heavy is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.simplefilter", lambda *_: None)
    monkeypatch.setattr("os.environ", dict(os.environ))
    for name in ("CI", "NO_COLOR", "KDTOOL_DEBUG", "KDTOOL_JSON"):
        monkeypatch.delitem(os.environ, name, raising=False)

    def install(work: Any) -> None:
        module, setup = types.ModuleType("kdtool.pipelines"), types.ModuleType("kdtool.pipelines.setup")
        setup.make_run = lambda config, reporter, command: types.SimpleNamespace(reporter=reporter, command=command)  # type: ignore[attr-defined]
        for name in ("distill", "evaluate", "export", "plan", "quickstart"):
            setattr(module, name, work)
        monkeypatch.setitem(sys.modules, "kdtool.pipelines", module)
        monkeypatch.setitem(sys.modules, "kdtool.pipelines.setup", setup)
        monkeypatch.setattr(kdtool, "pipelines", module, raising=False)

    return install


def raising(error: BaseException) -> Any:
    def work(*_: Any) -> None:
        raise error

    return work


EVALUATE = ["evaluate", "m", "--data", "d"]


@pytest.mark.parametrize("case", CASES)
def test_exit_codes(case: str, pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    error, code, word, message, _ = CASES[case]
    pipeline(raising(error))
    assert app.run([*EVALUATE, "--json"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["code"] == word
    assert err.startswith(f"error: {message}")
    assert "Traceback" not in err


def test_human_result(pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    def work(config: Any, run: Any) -> FakeResult:
        run.reporter.info("scoring")
        run.reporter.warn("odd data")
        builtins.print("noise of a library")
        return FakeResult()

    pipeline(work)
    assert app.run(EVALUATE) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "| metric   | student |",
        "|----------|---------|",
        "| accuracy | 0.84    |",
        "done: out",
        "next: kdtool export out",
    ]
    assert err.splitlines() == ["scoring", "warning: odd data", "noise of a library"]


def test_json_result(pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline(lambda *_: FakeResult())
    assert app.run([*EVALUATE, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["metrics"]["student"]["accuracy"] == 0.84
    assert err == ""


def test_quiet_result(pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline(lambda *_: FakeResult())
    assert app.run([*EVALUATE, "-q"]) == 0
    assert capsys.readouterr() == ("0.84\n", "")
    assert app.run(["export", "m", "-o", "out", "-q"]) == 0
    assert capsys.readouterr() == ("out\n", "")


def test_missed_gate_keeps_the_result(pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline(lambda *_: FakeResult(gates_missed=["accuracy 0.84 < 0.85"]))
    assert app.run([*EVALUATE, "--json"]) == 3
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert "error" not in answer
    assert answer["gates"] == ["accuracy 0.84 < 0.85"]
    assert "error: missed: accuracy 0.84 < 0.85" in err
    assert "kept in out" in err


def test_dry_run_prints_the_plan(pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline(lambda *_: {"teacher": {"name": "m", "layers": [1, 2]}, "steps": [{"name": "a", "n": 1}], "output": None})
    assert app.run([*EVALUATE, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "teacher:",
        "  name: m",
        "  layers:",
        "    - 1",
        "    - 2",
        "steps:",
        "  - name: a",
        "    n: 1",
        "output: -",
    ]
    assert app.run([*EVALUATE, "--dry-run", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["command"] == "evaluate"
    assert answer["plan"]["teacher"]["layers"] == [1, 2]


def test_environment_is_set_before_the_pipeline(pipeline) -> None:
    seen: dict[str, str] = {}

    def work(config: Any, run: Any) -> FakeResult:
        seen.update(os.environ)
        seen["command"] = run.command
        return FakeResult()

    pipeline(work)
    assert app.run([*EVALUATE, "--offline", "--cache-dir", "here", "--token", "hf_abcdefghijkl"]) == 0
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        assert seen[name] == "1"
    assert seen["HF_TOKEN"] == "hf_abcdefghijkl"
    assert seen["HF_HUB_CACHE"] == "here"
    assert seen["command"].startswith("kdtool evaluate m")
    assert "hf_abc" not in seen["command"]


def test_quickstart_takes_a_free_folder(pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work(name: str, run: Any, output: Path) -> FakeResult:
        output.mkdir()
        (output / "report.md").write_text("")
        return FakeResult(output=output, extra={"comparison": [["a", "b"], ["1", "2"]]})

    pipeline(work)
    assert app.run(["quickstart", "-q"]) == 0
    assert app.run(["quickstart", "-q"]) == 0
    assert capsys.readouterr().out.split() == ["quickstart-stories", "quickstart-stories-2"]
    assert app.run(["quickstart", "-q", "-o", "quickstart-stories"]) == 2
    capsys.readouterr()
    assert app.run(["quickstart", "intents"]) == 0
    assert "| a | b |" in capsys.readouterr().out


def test_other_ranks_print_no_result(pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline(lambda *_: FakeResult())
    os.environ["RANK"] = "1"
    assert app.run([*EVALUATE, "--json"]) == 0
    assert capsys.readouterr() == ("", "")
