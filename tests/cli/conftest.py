import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

Result = subprocess.CompletedProcess[str]

_CLEARED = ("KDTOOL_", "HF_", "TRANSFORMERS_", "TYPER_", "_KDTOOL")
_PLAIN = ("CI", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "RANK", "WORLD_SIZE", "LOCAL_RANK")


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a user who has set nothing."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_CLEARED) and name not in _PLAIN}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | dict(extra or {})


@pytest.fixture
def kdtool(tmp_path: Path) -> Callable[..., Result]:
    """Run the command line as a real process, in an empty folder."""

    def call(*args: str, env: Mapping[str, str] | None = None, timeout: float = 120) -> Result:
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
