"""`--launcher torchrun`: start several processes of the same command, and pass on how it went."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import typer

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
        typer.Exit: always, with that code.
    """
    with tempfile.TemporaryDirectory() as scratch:
        code_file = Path(scratch) / "code"
        # restarting workers hangs otherwise (torch 2.13)
        environment = os.environ | {EXIT_FILE: str(code_file), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        for name in ("KDTOOL_LAUNCHER", "KDTOOL_NPROC"):
            environment.pop(name, None)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        child = subprocess.Popen([*command, "-m", "kdtool", *without_launcher(argv)], env=environment)
        while True:
            try:
                ended = child.wait()
                break
            except KeyboardInterrupt:
                continue  # the terminal sent it to the workers, too: they write their checkpoint and end
        code = int(code_file.read_text(encoding="utf-8")) if code_file.is_file() else ended
    raise typer.Exit(code if code >= 0 else 128 - code)


def leave_code(code: int) -> int:
    """Leave this process's exit code for the launcher, and return the one to exit with.

    A missed gate (3) is a result: exiting with it would make torchrun report a crash.
    """
    target = os.environ.get(EXIT_FILE)
    if not target or os.environ.get("RANK", "0") != "0":
        return code
    Path(target).write_text(str(code), encoding="utf-8")
    return 0 if code == 3 else code
