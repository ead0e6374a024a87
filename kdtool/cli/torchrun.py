"""`--launcher torchrun`: start several processes of the same command, and pass on how it went.

Run as a module it is torchrun itself, without the traceback by which that reports a lost worker:
`python -m kdtool.cli.torchrun LOST_FILE TORCHRUN_ARGUMENTS`.
"""

import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import typer

from kdtool.errors import TrainingProblem

EXIT_FILE = "KDTOOL_EXIT_FILE"
"""Where the first process leaves its exit code, since torchrun passes on only 0 and 1."""


def without_launcher(argv: Sequence[str]) -> list[str]:
    """The arguments without --launcher and --nproc and their values."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif word in ("--launcher", "--nproc"):
            skip = True
        elif not word.startswith(("--launcher=", "--nproc=")):
            kept.append(word)
    return kept


def relaunch(argv: Sequence[str], processes: int) -> None:
    """Run the same command in several processes and exit with the code of the first.

    Args:
        argv: Arguments of this invocation.
        processes: How many to start on this machine.

    Raises:
        typer.Exit: with that code.
        TrainingProblem: the first process left none; it or its launcher was killed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        code_file, lost_file = Path(scratch) / "code", Path(scratch) / "lost"
        # restarting workers hangs otherwise (torch 2.13)
        environment = os.environ | {EXIT_FILE: str(code_file), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        for name in ("KDTOOL_LAUNCHER", "KDTOOL_NPROC"):
            environment.pop(name, None)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        command = [sys.executable, "-m", __name__, str(lost_file), "--standalone", f"--nproc_per_node={processes}"]
        # a session of its own: torchrun would take Ctrl-C twice, from the terminal and from here
        child = subprocess.Popen(
            [*command, "-m", "kdtool", *without_launcher(argv)], env=environment, start_new_session=True
        )
        ended = _outlast(child)
        lost = lost_file.read_text(encoding="utf-8") if lost_file.is_file() else None
        if code_file.is_file():
            raise typer.Exit(int(code_file.read_text(encoding="utf-8")))
    if ended == 0:
        raise typer.Exit(0)
    raise TrainingProblem(
        lost or f"the launcher of this job ended with {ended}", hint="the same command goes on from the last checkpoint"
    )


def _outlast(child: subprocess.Popen[bytes]) -> int:
    """Wait for torchrun; pass on the first Ctrl-C or SIGTERM, upon which workers write their checkpoint and end."""
    passed_on = False
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:  # the command line turns SIGTERM into this, too
            if not passed_on:
                child.terminate()
            passed_on = True


def shield() -> None:
    """Let a process of several outlive the loss of another until it has said what happened.

    torchrun then ends the others with SIGTERM. A running command turns that into an orderly stop;
    this is for the time after it, when its message and exit code are on their way.
    """
    if "RANK" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def leave_code(code: int) -> int:
    """Leave this process's exit code for the launcher, and return the one to exit with.

    A missed gate (3) is a result: exiting with it would make torchrun report a crash.
    """
    target = os.environ.get(EXIT_FILE)
    if not target or os.environ.get("RANK", "0") != "0":
        return code
    Path(target).write_text(str(code), encoding="utf-8")
    return 0 if code == 3 else code


def _agent(lost_file: str, arguments: Sequence[str]) -> int:
    """torchrun, with a lost worker written to a file in one line instead of a traceback."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # said in one line below; the workers are processes of their own
    try:
        run.main(list(arguments))
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as error:
        first, failure = error.get_first_failure()
        how = f"exit code {failure.exitcode}"
        if failure.exitcode < 0:
            how = signal.Signals(-failure.exitcode).name
        Path(lost_file).write_text(f"process {first} of this job was ended by {how}", encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_agent(sys.argv[1], sys.argv[2:]))
