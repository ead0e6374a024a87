"""Wrong usage: exit 2, one line what, a hint; data and messages on their own streams."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import clean_environment

WRONG = {
    "unknown command": (["distil"], "unknown command 'distil'", "did you mean distill?"),
    "unknown option": (["distill", "--studnt", "x"], "unknown option '--studnt'", "--student"),
    "underscores": (["distill", "--max_steps", "3"], "unknown option '--max_steps'", "did you mean --max-steps?"),
    "key as option": (["distill", "--head-lr", "3"], "unknown option '--head-lr'", "--set train.head_lr="),
    "setting as option": (
        ["distill", "--method", "kd", "--temperature", "3"],
        "unknown option '--temperature'",
        "--set method.temperature=",
    ),
    "missing value": (["distill", "--lr"], "option '--lr' requires an argument", "kdtool distill --help"),
    "not a number": (["distill", "--batch-size", "x"], "'--batch-size'", "kdtool distill --help"),
    "out of range": (["distill", "--batch-size", "0"], "'--batch-size'", "kdtool distill --help"),
    "negative rate": (["distill", "--lr=-1"], "train.lr=-1", ""),
    "not a choice": (["distill", "--dtype", "float8"], "'--dtype'", "kdtool distill --help"),
    "extra argument": (["distill", "a", "b"], "unexpected extra argument", "kdtool distill --help"),
    "unknown method": (["distill", "t", "--method", "kdd"], "unknown method 'kdd'", "did you mean kd"),
    "unknown setting": (
        ["distill", "t", "--method", "kd", "--set", "method.temprature=2"],
        "unknown key 'method.temprature'",
        "did you mean temperature?",
    ),
    "unknown key": (["distill", "--set", "train.lrr=1"], "unknown key 'train.lrr'", "did you mean lr"),
    "no method": (["distill", "t"], "no method given", "kdtool methods ls"),
    "no teacher": (["distill", "--method", "kd"], "no teacher given", "TEACHER"),
    "no student": (["distill", "t", "--method", "kd"], "no student given", "--student"),
    "no data": (["distill", "t", "--method", "kd", "--student", "s"], "no data given", "--data"),
    "no output": (
        ["distill", "t", "--method", "kd", "--student", "s", "--data", "d"],
        "no output folder given",
        "-o FOLDER",
    ),
    "unknown task": (["evaluate", "m", "--task", "text-clasification"], "unknown task", "text-classification"),
    "no model": (["evaluate"], "no model given", "kdtool evaluate MODEL"),
    "nothing to evaluate on": (["evaluate", "m"], "nothing to evaluate on", "--benchmark"),
    "unknown benchmark": (["evaluate", "m", "--benchmark", "banking"], "unknown benchmark", "banking77"),
    "bad gate": (["evaluate", "m", "--fail-under", "accuracy"], "gate 'accuracy'", "accuracy=0.85"),
    "no number in gate": (["evaluate", "m", "--fail-under", "accuracy=high"], "'high' is not a number", ""),
    "unknown metric": (["evaluate", "m", "--fail-under", "acuracy=1"], "unknown metric 'acuracy'", "accuracy"),
    "bad device": (["evaluate", "m", "--device", "gpu"], "unknown device 'gpu'", "cuda"),
    "unknown format": (["export", "m", "--format", "safetensor", "-o", "x"], "unknown export format", "safetensors"),
    "export without output": (["export", "m"], "no output folder given", "-o"),
    "revision twice": (["export", "a/b@main", "--revision", "v1", "-o", "x"], "--revision does not apply", "@"),
    "bad repository": (["export", "m", "-o", "x", "--push", "a/b/c"], "not a repository id", "owner/name"),
    "push offline": (
        ["export", "m", "-o", "x", "--push", "a/b", "--offline"],
        "--push cannot work with --offline",
        "leave one",
    ),
    "unknown plug-in": (["methods", "show", "kdd"], "nothing is named 'kdd'", "did you mean kd"),
    "unknown recipe": (["recipes", "show", "quickstart-story"], "unknown recipe", "quickstart-stories"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage(case: str, kdtool) -> None:
    arguments, message, hint = WRONG[case]
    done = kdtool(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert lines[-1].startswith("Hint: ")
    assert hint in lines[-1]
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr


def test_method_that_does_not_fit_the_task(kdtool) -> None:
    done = kdtool("distill", "t", "--student", "s", "--method", "label-smoothing", "--data", "d", "--task", "causal-lm")
    if "does not fit" in done.stderr:  # else it has come to fit, and the output folder is asked for
        assert "methods for causal-lm: " in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("train:\n  lrr: 1\n", "run.yaml:2: unknown key 'train.lrr'", "did you mean lr"),
        ("train: [1,\n", "run.yaml:", "YAML"),
        ("- 1\n", "a configuration is a mapping", "recipes"),
        ("command: export\n", "is a configuration for 'kdtool export'", ""),
        ("train:\n  lr: fast\n", "run.yaml:2: train.lr='fast'", ""),
    ],
)
def test_bad_configuration_file(text: str, message: str, hint: str, tmp_path: Path, kdtool) -> None:
    (tmp_path / "run.yaml").write_text(text)
    done = kdtool("distill", "-c", "run.yaml")
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[0]
    assert hint in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--json", "distil"],
        ["distill", "--bogus", "--json"],
        ["distill", "--json", "--method", "kdd"],
        ["methods", "show", "kdd", "--json"],
        ["distill", "--json", "--batch-size", "x"],
    ],
)
def test_json_has_one_error_object(arguments: list[str], kdtool) -> None:
    done = kdtool(*arguments)
    assert done.returncode == 2
    answer = json.loads(done.stdout)
    assert set(answer) == {"schema", "error"}
    assert answer["schema"] == 1
    assert set(answer["error"]) == {"code", "message", "hint"}
    assert done.stderr.startswith("error: ")


def test_json_from_the_environment(process) -> None:
    done = process("distill", "--bogus", env={"KDTOOL_JSON": "1"})
    assert json.loads(done.stdout)["error"]["code"] == "usage"


def test_output_folder_in_use(tmp_path: Path, process) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    done = process("export", "m", "-o", "out")
    assert done.returncode == 2
    assert "output folder 'out' is not empty" in done.stderr
    assert "--overwrite" in done.stderr


def test_output_must_not_be_an_input(tmp_path: Path, kdtool) -> None:
    (tmp_path / "models" / "teacher").mkdir(parents=True)
    for output in ("models/teacher", "models"):
        done = kdtool("export", "models/teacher", "-o", output, "--overwrite")
        assert done.returncode == 2
        assert "holds the teacher 'models/teacher'" in done.stderr


def test_output_is_a_file(tmp_path: Path, kdtool) -> None:
    (tmp_path / "out").write_text("")
    assert "is a file" in kdtool("export", "m", "-o", "out").stderr


def test_typed_words_win_over_the_environment(kdtool) -> None:
    """KDTOOL_LR loses against --lr and against --set; each value given is wrong in its own way."""
    env = {"KDTOOL_LR": "-3"}
    assert "train.lr=-3" in kdtool("distill", env=env).stderr
    assert "train.lr=-2" in kdtool("distill", "--lr=-2", env=env).stderr
    assert "train.lr=-1" in kdtool("distill", "--set", "train.lr=-1", env=env).stderr


def test_options_win_over_the_file(tmp_path: Path, kdtool) -> None:
    (tmp_path / "run.yaml").write_text("train:\n  lr: -1\n")
    assert "train.lr=-1" in kdtool("distill", "-c", "run.yaml").stderr
    assert "train.lr=-2" in kdtool("distill", "-c", "run.yaml", "--lr=-2").stderr


def test_no_arguments_show_help_on_stderr(process) -> None:
    done = process()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Usage: kdtool")


def test_version(process) -> None:
    done = process("--version")
    assert re.fullmatch(r"kdtool \d+\.\d+\S*\n", done.stdout)
    assert done.stderr == ""


def test_debug_shows_the_traceback(process) -> None:
    assert "Traceback" in process("methods", "show", "kdd", env={"KDTOOL_DEBUG": "1"}).stderr
    assert "Traceback" in process("distill", "-vv").stderr
    assert "Traceback" not in process("distill", "-v").stderr


def test_a_closed_pipe_is_silent(tmp_path: Path) -> None:
    script = f"{sys.executable} -m kdtool methods ls | head -n 1; {sys.executable} -m kdtool --help | true"
    done = subprocess.run(["bash", "-c", script], env=clean_environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "methods\n"
    assert done.stderr == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_end_with_130(number: signal.Signals, tmp_path: Path) -> None:
    """A run that is stopped while it works says so in one line, and as JSON."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time, types\n"
        "def wait(*_):\n"
        "    print('working', file=sys.stderr, flush=True)\n"
        "    time.sleep(60)\n"
        "setup = types.ModuleType('kdtool.pipelines.setup')\n"
        "setup.make_run = wait\n"
        "pipelines = types.ModuleType('kdtool.pipelines')\n"
        "pipelines.setup = setup\n"
        "sys.modules |= {'kdtool.pipelines': pipelines, 'kdtool.pipelines.setup': setup}\n"
    )
    environment = clean_environment({"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"})
    process = subprocess.Popen(
        [sys.executable, "-m", "kdtool", "evaluate", "m", "--data", "d", "--json"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "working\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert json.loads(out)["error"]["code"] == "interrupted"
    assert err == "error: interrupted\n"
