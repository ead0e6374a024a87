"""Configurations that come with the package: YAML files whose first comment line is the summary."""

import re
from pathlib import Path

from kdtool.errors import UsageProblem, nearest

_FOLDER = Path(__file__).parent
_COMMAND = re.compile(r"^command:\s*([\w-]+)\s*$", re.MULTILINE)


def names() -> list[str]:
    """Names of all recipes, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def path(name: str) -> Path:
    """File of a recipe.

    Raises:
        UsageProblem: there is no recipe of that name.
    """
    if name not in names():
        raise UsageProblem(f"unknown recipe '{name}'", hint=f"{nearest(name, names())} See: kdtool recipes ls")
    return _FOLDER / f"{name}.yaml"


def read(name: str) -> str:
    """Text of a recipe."""
    return path(name).read_text(encoding="utf-8")


def summary(name: str) -> str:
    """First comment line of a recipe."""
    return read(name).split("\n", 1)[0].lstrip("# ").rstrip()


def command(name: str) -> str:
    """Subcommand that a recipe is for (default: distill)."""
    stated = _COMMAND.search(read(name))
    return stated[1] if stated else "distill"
