"""What the user sees: results on standard output, everything else on standard error."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO

from kdtool.errors import KdtoolError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Mode = Literal["human", "json", "quiet"]

PLAIN_SECONDS = 10.0
"""Seconds between two progress lines where there is no terminal."""
LIVE_SECONDS = 0.1
"""Seconds between two redraws of the live bar."""


def is_plain(stream: TextIO, environ: Mapping[str, str] | None = None) -> bool:
    """Whether a stream must be written without colours and without moving the cursor."""
    environ = os.environ if environ is None else environ
    switched_off = bool(environ.get("NO_COLOR")) or bool(environ.get("CI")) or environ.get("TERM") == "dumb"
    return switched_off or not stream.isatty()


def one_line(text: str) -> str:
    """Collapse all white space, so that a message stays on its line."""
    return " ".join(text.split())


def format_seconds(seconds: float) -> str:
    """Write a duration as people say it: `8s`, `2m05s`, `3h10m`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows, header first, as a Markdown table that is aligned in plain text too."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def format_facts(facts: Mapping[str, float | str]) -> str:
    """Write the numbers of a progress report: `loss 0.432, lr 0.0001`."""
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
    )


class Console:
    """Writes for one run; implements `kdtool.run.Reporter`.

    Args:
        mode: `human` shows messages and progress, `json` and `quiet` only warnings and errors.
        verbosity: Number of `-v`; from 1 on, messages are shown in every mode.
        main_process: False on the other processes of a distributed run, which print no results.
        out: Where results go (default: standard output).
        err: Where messages go (default: standard error).
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        mode: Mode = "human",
        verbosity: int = 0,
        *,
        main_process: bool = True,
        out: TextIO | None = None,
        err: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mode: Mode = mode
        self.verbosity = verbosity
        self.main_process = main_process
        self.answered = False
        """True once the one JSON object of `--json` was written."""
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._clock = clock
        self._plain = is_plain(self._err)
        self._live: tuple[Progress, TaskID] | None = None
        self._stage: str | None = None
        self._started = 0.0
        self._shown = 0.0

    @property
    def talks(self) -> bool:
        """Whether messages that are no warnings are shown."""
        return self.main_process and (self.mode == "human" or self.verbosity > 0)

    def info(self, message: str) -> None:
        """Say what happens, in one line."""
        if self.talks:
            self._say(message)

    def warn(self, message: str) -> None:
        """Say what the user should know, in one line."""
        if self.main_process:
            self._say(f"{self._paint('warning:', '33')} {one_line(message)}")

    def progress(self, stage: str, done: int, total: int, facts: Mapping[str, float | str]) -> None:
        """Report a position in a long stage; called often, shown rarely."""
        if not self.talks:
            return
        now = self._clock()
        if stage != self._stage:
            self._end_stage()
            self._stage, self._started, self._shown = stage, now, now
        if self._plain:
            self._progress_line(stage, done, total, facts, now)
        else:
            self._progress_bar(stage, done, total, facts, now)

    def print(self, text: str) -> None:
        """Write a result for people to standard output."""
        if self.main_process:
            self._end_stage()
            print(text, file=self._out, flush=True)

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Write a table, header first, to standard output; nothing when there are no rows."""
        if rows:
            self.print(format_table(rows))

    def answer(self, values: Mapping[str, Any]) -> None:
        """Write the one JSON object of `--json` to standard output; later ones are dropped."""
        if self.main_process and not self.answered:
            self.answered = True
            from kdtool.writing import as_text

            self.print(as_text({"schema": 1, **values}).rstrip("\n"))

    def fail(self, error: KdtoolError) -> None:
        """Write what went wrong, why, and what to do next; with `--json` also the error object."""
        self._end_stage()
        self._say(f"{self._paint('error:', '31')} {one_line(error.message)}")
        if error.why:
            self._say(f"  {one_line(error.why)}")
        if error.hint:
            self._say(f"{self._paint('Hint:', '36')} {one_line(error.hint)}")
        if self.mode == "json":
            self.answer({"error": error.as_dict()})

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._end_stage()

    def _say(self, line: str) -> None:
        if self._live is not None:
            self._live[0].console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._err, flush=True)

    def _paint(self, text: str, colour: str) -> str:
        return text if self._plain or self._live is not None else f"\x1b[{colour}m{text}\x1b[0m"

    def _progress_line(self, stage: str, done: int, total: int, facts: Mapping[str, float | str], now: float) -> None:
        ended = total > 0 and done >= total
        due = now - self._shown >= PLAIN_SECONDS or (ended and self._shown > self._started)
        if not due:
            return
        self._shown = now
        elapsed = now - self._started
        parts = [f"{stage} {done}/{total}" if total > 0 else f"{stage} {done}"]
        if total > 0:
            parts[0] += f" ({100 * done // total} %)"
        if 0 < done < total:
            parts.append(f"{format_seconds(elapsed / done * (total - done))} left")
        if facts:
            parts.append(format_facts(facts))
        self._say(", ".join(parts))

    def _progress_bar(self, stage: str, done: int, total: int, facts: Mapping[str, float | str], now: float) -> None:
        if self._live is None:
            # rich costs 0.1 s to import: only where a bar is drawn.
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}"),
                console=RichConsole(file=self._err),
                auto_refresh=False,
                transient=True,
            )
            bar.start()
            self._live = bar, bar.add_task(stage, total=total or None, facts="")
            self._shown = now - LIVE_SECONDS
        ended = total > 0 and done >= total
        if ended or now - self._shown >= LIVE_SECONDS:
            self._shown = now
            bar, task = self._live
            bar.update(task, completed=done, total=total or None, facts=format_facts(facts))
            bar.refresh()
        if ended:
            self._end_stage()

    def _end_stage(self) -> None:
        self._stage = None
        if self._live is not None:
            bar, self._live = self._live[0], None
            bar.stop()
