"""Runs kdtool commands in forks of a warm process, and kills them at chosen moments.

Reads one JSON object a line from standard input and answers each with one on standard output:

    {"argv": [...], "log": FILE, "stop": {"event": N, "signal": "KILL"}, "trace": FILE}

The first job runs in the warm process itself, so that all imports happen once; the others run in forks,
each as `kdtool ARGV` would. Everything that changes
the disk (flush, rename, remove, make a folder, write weights) and everything that advances training
(step, gradients done, teacher chunk) is an event; before event number N the process sends itself the
signal. A write of weights counts twice: before it, and with half of the file on disk. `trace` asks for
the list of events instead. The answer is `{"code": N}`, or `{"signal": N}` for a killed process.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

TWO_STAGE = "tests.reliability.two_stage"


class Events:
    """Counts events, and stops the process at one of them."""

    def __init__(self, job: dict[str, Any]) -> None:
        stop = job.get("stop") or {}
        self.at = stop.get("event")
        self.signal = signal.Signals[f"SIG{stop.get('signal', 'KILL')}"]
        self.names: list[str] = []

    def note(self, name: str) -> bool:
        """Count an event; True if it is the one to stop at."""
        self.names.append(name)
        return len(self.names) - 1 == self.at

    def happen(self, name: str) -> None:
        if self.note(name):
            os.kill(os.getpid(), self.signal)

    def before(self, owner: Any, attribute: str, name: str = "") -> None:
        """Make each call of a function an event."""
        real: Callable[..., Any] = getattr(owner, attribute)

        def watched(*args: Any, **kwargs: Any) -> Any:
            place = Path(str(args[0])).name if owner is os and args else ""
            self.happen(name or f"{attribute} {place}".strip())
            return real(*args, **kwargs)

        setattr(owner, attribute, watched)

    def torn(self, owner: Any, attribute: str) -> None:
        """Make writing a weight file two events; at the second, half of the file is there."""
        real: Callable[..., Any] = getattr(owner, attribute)

        def watched(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
            self.happen(f"write {Path(filename).name}")
            real(tensors, filename, *args, **kwargs)
            if self.note(f"tear {Path(filename).name}"):
                os.truncate(filename, Path(filename).stat().st_size // 2)
                os.kill(os.getpid(), self.signal)

        setattr(owner, attribute, watched)


def watch(events: Events) -> None:
    """Put events into everything that matters."""
    import transformers.modeling_utils

    from kdtool import teacher_cache
    from kdtool.train import checkpoint, loop

    # a killed process, unlike a machine without power, loses nothing that was not flushed: save the time
    os.fsync = lambda _handle: None
    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
        events.before(os, name)
    events.torn(checkpoint, "save_file")
    events.torn(transformers.modeling_utils, "safe_save_file")
    events.before(loop.Trainer, "_step", "step")
    events.before(loop.Trainer, "_divide_and_clip", "gradients")
    events.before(loop.Trainer, "_after", "stepped")
    events.before(teacher_cache.TeacherCache, "_run_teacher", "teacher")
    # between the values of a chunk and their checksum
    events.before(teacher_cache, "_checksum", "checksum")


def child(job: dict[str, Any]) -> int:
    """Run one command; never returns to the parent's loop."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from kdtool.cli import app
    from kdtool.registry import METHODS

    METHODS._modules["two-stage"] = TWO_STAGE
    events = Events(job)
    watch(events)
    code = app.run([str(word) for word in job["argv"]])
    if job.get("trace"):
        names = list(events.names)
        Path(job["trace"]).write_text(json.dumps(names), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def main() -> None:
    """Serve jobs until standard input ends."""
    import torch

    from kdtool.cli import app

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    code = app.run(json.loads(sys.stdin.readline())["argv"])
    print(json.dumps({"code": code}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = child(job)
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status)
        answer = {"signal": os.WTERMSIG(status)} if killed else {"code": os.WEXITSTATUS(status)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
