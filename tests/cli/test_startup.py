"""What a user waits for before anything happens: nothing heavy may be imported."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import clean_environment

HEAVY = ["torch", "transformers", "datasets", "numpy", "huggingface_hub.hf_api"]

PROBE = """
import json, sys
from kdtool.cli.app import run
code = run(sys.argv[1:])
print()
print(json.dumps([code, sorted(sys.modules)]))
"""

CASES = {
    "help": (["--help"], 0),
    "version": (["--version"], 0),
    "no arguments": ([], 2),
    "distill help": (["distill", "--help"], 0),
    "compare help": (["compare", "--help"], 0),
    "evaluate help": (["evaluate", "--help"], 0),
    "export help": (["export", "--help"], 0),
    "patch-attention help": (["patch-attention", "--help"], 0),
    "unknown operator": (["patch-attention", "m", "--data", "d", "--method", "none", "-o", "o"], 2),
    "methods help": (["methods", "--help"], 0),
    "recipes help": (["recipes", "copy", "--help"], 0),
    "quickstart help": (["quickstart", "--help"], 0),
    "unknown command": (["distil"], 2),
    "unknown option": (["distill", "--studnt", "x"], 2),
    "unknown method": (["distill", "t", "--student", "s", "--method", "kdd", "--data", "d", "-o", "o"], 2),
    "method setting": (["distill", "t", "--method", "kd", "--set", "method.temprature=2"], 2),
    "unknown key": (["distill", "t", "--set", "train.lrr=1"], 2),
    "bad yaml": (["distill", "-c", "bad.yaml"], 2),
    "missing file": (["distill", "-c", "none.yaml"], 2),
    "bad gate": (["evaluate", "m", "--data", "d", "--fail-under", "accuracy"], 2),
    "unknown benchmark": (["evaluate", "m", "--benchmark", "nothing"], 2),
    "unknown format": (["export", "m", "--format", "nothing", "-o", "o"], 2),
    "methods ls": (["methods", "ls"], 0),
    "methods show": (["methods", "show", "kd"], 0),
    "recipes ls": (["recipes", "ls"], 0),
}


def probe(arguments: list[str], folder: Path) -> tuple[int, list[str], float]:
    (folder / "bad.yaml").write_text("train: [1,\n")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        env=clean_environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    code, modules = json.loads(done.stdout.splitlines()[-1])
    return code, modules, seconds


@pytest.mark.parametrize("case", CASES)
def test_nothing_heavy_is_imported(case: str, tmp_path: Path) -> None:
    arguments, expected = CASES[case]
    code, modules, _ = probe(arguments, tmp_path)
    assert code == expected
    assert [name for name in HEAVY if name in modules] == []


def test_help_stays_clear_of_configuration(tmp_path: Path) -> None:
    _, modules, _ = probe(["--help"], tmp_path)
    assert [name for name in ("pydantic", "yaml", "rich") if name in modules] == []


@pytest.mark.parametrize(
    ("arguments", "limit"), [(["--help"], 0.30), (["distill", "--help"], 0.45), (["distil"], 0.45)]
)
def test_cpu_time(arguments: list[str], limit: float, tmp_path: Path) -> None:
    # The first start compiles; the best of five is what the code costs on an idle machine.
    assert min(probe(arguments, tmp_path)[2] for _ in range(5)) <= limit
