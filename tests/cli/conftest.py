import contextlib
import functools
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from kdtool.cli import app

Result = subprocess.CompletedProcess[str]

_CLEARED = ("KDTOOL_", "HF_", "TRANSFORMERS_", "TYPER_", "_KDTOOL")
_PLAIN = ("CI", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "RANK", "WORLD_SIZE", "LOCAL_RANK")


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a user who has set nothing."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_CLEARED) and name not in _PLAIN}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | dict(extra or {})


def run_here(*args: str | Path, folder: Path, env: Mapping[str, str] | None = None) -> Result:
    """Run the command line in this process and a folder, as `main` does."""
    out, err, before = io.StringIO(), io.StringIO(), dict(os.environ)
    own = clean_environment(env)
    try:
        os.environ.clear()
        os.environ.update(own)
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            code = app.run([str(arg) for arg in args])
    finally:
        os.environ.clear()
        os.environ.update(before)
    return subprocess.CompletedProcess([str(arg) for arg in args], code, out.getvalue(), err.getvalue())


@pytest.fixture
def kdtool(tmp_path: Path) -> Callable[..., Result]:
    """Run the command line in this process, in an empty folder."""
    return functools.partial(run_here, folder=tmp_path)


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., Result]:
    """Run the command line as a real process, in an empty folder."""

    def call(*args: str, env: Mapping[str, str] | None = None, timeout: float = 600) -> Result:
        return subprocess.run(
            [sys.executable, "-m", "kdtool", *args],
            env=clean_environment(env),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    return call
