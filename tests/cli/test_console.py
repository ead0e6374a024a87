import io
import json

import pytest

from kdtool.cli.console import Console, format_seconds, format_table, is_plain
from kdtool.errors import KdtoolError


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_colours_only_on_a_free_terminal() -> None:
    assert is_plain(io.StringIO(), {})
    assert not is_plain(Terminal(), {"TERM": "xterm"})
    for name, value in (("NO_COLOR", "1"), ("CI", "true"), ("TERM", "dumb")):
        assert is_plain(Terminal(), {name: value})


@pytest.mark.parametrize(("seconds", "text"), [(8.9, "8s"), (125, "2m05s"), (11400, "3h10m")])
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_format_table() -> None:
    assert format_table([["a", "bb"], ["ccc", ""]]).splitlines() == ["| a   | bb |", "|-----|----|", "| ccc |    |"]


def test_plain_progress_is_one_line_in_ten_seconds() -> None:
    clock, err = Clock(), io.StringIO()
    console = Console(err=err, clock=clock)
    for step in range(1, 101):
        clock.now = step * 0.25
        console.progress("train", step, 100, {"loss": 0.5, "epoch": "1/3"})
    lines = err.getvalue().splitlines()
    assert lines[0].startswith("train 41/100 (41 %), ")
    assert lines[0].endswith("left, loss 0.5, epoch 1/3")
    assert len(lines) == 3
    assert lines[-1].startswith("train 100/100 (100 %)")


def test_short_stages_say_nothing() -> None:
    clock, err = Clock(), io.StringIO()
    console = Console(err=err, clock=clock)
    for stage in ("score", "latency"):
        for step in range(10):
            clock.now += 0.5
            console.progress(stage, step + 1, 10, {})
    assert err.getvalue() == ""


def test_progress_of_unknown_length() -> None:
    clock, err = Clock(), io.StringIO()
    console = Console(err=err, clock=clock)
    console.progress("read", 1, 0, {})
    clock.now = 11.0
    console.progress("read", 500, 0, {})
    assert err.getvalue() == "read 500\n"


def test_live_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    clock, out, err = Clock(), io.StringIO(), Terminal()
    console = Console(out=out, err=err, clock=clock)
    for step in range(1, 5):
        clock.now = float(step)
        console.progress("train", step, 5, {"loss": 0.25})
    console.info("a [word] in brackets")
    console.warn("careful")
    console.close()
    console.print("result")
    assert "train" in err.getvalue()
    assert "loss 0.25" in err.getvalue()
    assert "a [word] in brackets" in err.getvalue()
    assert out.getvalue() == "result\n"


@pytest.mark.parametrize("mode", ["json", "quiet"])
def test_other_modes_only_warn(mode: str) -> None:
    clock, out, err = Clock(), io.StringIO(), io.StringIO()
    console = Console(mode, out=out, err=err, clock=clock)  # type: ignore[arg-type]
    console.info("working")
    console.progress("train", 1, 2, {})
    clock.now = 60.0
    console.progress("train", 2, 2, {})
    console.warn("two\nlines")
    assert err.getvalue() == "warning: two lines\n"
    assert out.getvalue() == ""


def test_verbose_speaks_in_every_mode() -> None:
    err = io.StringIO()
    Console("json", 1, err=err).info("working")
    assert err.getvalue() == "working\n"


def test_one_answer_only() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console("json", out=out, err=err)
    console.answer({"value": float("nan"), "names": {"b", "a"}})
    console.fail(KdtoolError("late", why="because", hint="try again"))
    assert json.loads(out.getvalue()) == {"schema": 1, "value": None, "names": ["a", "b"]}
    assert err.getvalue() == "error: late\n  because\nHint: try again\n"


def test_other_processes_keep_quiet() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(main_process=False, out=out, err=err)
    console.info("a")
    console.warn("b")
    console.print("c")
    console.answer({})
    assert out.getvalue() + err.getvalue() == ""


def test_errors_are_coloured_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    err = Terminal()
    Console(err=err).fail(KdtoolError("no"))
    assert err.getvalue() == "\x1b[31merror:\x1b[0m no\n"
