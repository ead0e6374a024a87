"""`methods`, `recipes`, `env`, help pages, completion: read-only and instant."""

import json
from pathlib import Path

import pytest
import yaml

from kdtool import recipes
from kdtool.registry import ALL, METHODS


def test_methods_ls_names_every_plugin(kdtool) -> None:
    done = kdtool("methods", "ls")
    assert done.returncode == 0
    assert done.stderr == ""
    for registry in ALL.values():
        for name in registry.names():
            assert f"  {name} " in done.stdout
            assert registry.summary(name) in done.stdout


def test_methods_ls_json(kdtool) -> None:
    answer = json.loads(kdtool("methods", "ls", "--json").stdout)
    assert answer["schema"] == 1
    assert list(answer["plugins"]) == list(ALL)
    assert sorted(answer["plugins"]["methods"]) == METHODS.names()
    assert set(answer["plugins"]["methods"]["kd"]) == {"summary", "paper", "tasks"}


def test_methods_show(kdtool) -> None:
    page = kdtool("methods", "show", "kd").stdout
    assert "kd (method)" in page
    assert "arXiv:1503.02531" in page
    assert "temperature = 4.0" in page
    assert "--method kd" in page


def test_methods_show_json(kdtool) -> None:
    answer = json.loads(kdtool("methods", "show", "kd", "--json").stdout)
    (plugin,) = answer["plugins"]
    assert plugin["kind"] == "method"
    temperature = next(setting for setting in plugin["settings"] if setting["name"] == "temperature")
    assert temperature["default"] == 4.0
    assert temperature["required"] is False
    assert temperature["doc"]


def test_plugins_of_other_packages(tmp_path: Path, process) -> None:
    """An installed package may bring a method; a required setting is asked for by name."""
    (tmp_path / "their_kd.py").write_text(
        '"""Distil as they do."""\n\nclass Config:\n    weight: float\n    """How much."""\n\n'
        'class Method:\n    paper = "Theirs 2026"\n    tasks = frozenset({"causal-lm"})\n'
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kdtool.methods]\ntheirs = their_kd\n")
    env = {"PYTHONPATH": str(tmp_path)}
    page = process("methods", "show", "theirs", env=env).stdout
    assert "Distil as they do." in page
    assert "weight = required" in page
    assert "theirs " in process("methods", "ls", env=env).stdout
    done = process("distill", "t", "--method", "theirs", env=env)
    assert done.returncode == 2
    assert "theirs needs --set method.weight=..." in done.stderr
    done = process(
        "distill", "t", "--method", "theirs", "--set", "method.weight=1.0", "--student", "s", "--data", "d",
        "--task", "text-classification", env=env,
    )  # fmt: skip
    assert "method 'theirs' does not fit task 'text-classification'" in done.stderr
    assert "methods for text-classification: " in done.stderr
    assert " kd, " in done.stderr


def test_recipes_have_a_summary_and_are_valid() -> None:
    assert recipes.names()
    for name in recipes.names():
        assert recipes.read(name).startswith("# ")
        assert len(recipes.summary(name)) > 10
        assert isinstance(yaml.safe_load(recipes.read(name)), dict)


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_load(name: str) -> None:
    from kdtool.config import load_config

    config = load_config(recipes.command(name), recipes.path(name))  # type: ignore[arg-type]
    assert config.command == recipes.command(name)


def test_recipes_ls_and_show(kdtool) -> None:
    name = recipes.names()[0]
    assert recipes.summary(name) in kdtool("recipes", "ls").stdout
    assert kdtool("recipes", "show", name).stdout == recipes.read(name).rstrip("\n") + "\n"
    assert json.loads(kdtool("recipes", "ls", "--json").stdout)["recipes"][name] == recipes.summary(name)
    assert json.loads(kdtool("recipes", "show", name, "--json").stdout)["text"] == recipes.read(name)


def test_recipes_copy(tmp_path: Path, kdtool) -> None:
    name = recipes.names()[0]
    done = kdtool("recipes", "copy", name, "mine.yaml")
    assert done.returncode == 0
    assert (tmp_path / "mine.yaml").read_text() == recipes.read(name)
    assert f"kdtool {recipes.command(name)} -c mine.yaml" in done.stdout
    again = kdtool("recipes", "copy", name, "mine.yaml")
    assert again.returncode == 2
    assert "mine.yaml exists" in again.stderr
    assert kdtool("recipes", "copy", name, "mine.yaml", "--overwrite").returncode == 0
    (tmp_path / "folder").mkdir()
    assert kdtool("recipes", "copy", name, "folder", "-h").returncode == 0
    assert json.loads(kdtool("recipes", "copy", name, "folder", "--json").stdout)["output"] == f"folder/{name}.yaml"


def test_env_never_shows_tokens(kdtool) -> None:
    env = {
        "HF_TOKEN": "hf_abcdefghijkl",
        "KDTOOL_TOKEN": "hf_mnopqrstuvwx",
        "HF_ENDPOINT": "http://user:geheim@localhost:1",
        "KDTOOL_LR": "0.1",
    }
    done = kdtool("env", "--json", env=env)
    assert done.returncode == 0
    answer = json.loads(done.stdout)
    assert answer["environment"]["HF_TOKEN"] == "(set)"
    assert answer["environment"]["KDTOOL_TOKEN"] == "(set)"
    assert answer["environment"]["KDTOOL_LR"] == "0.1"
    assert answer["packages"]["torch"]
    assert answer["devices"][0] == "cpu"
    assert answer["cpus"] >= 1
    for secret in ("hf_abc", "hf_mno", "geheim"):
        assert secret not in done.stdout


def test_env_is_text_by_default(process) -> None:
    page = process("env").stdout
    assert page.startswith("Python: ")
    assert "Devices: cpu" in page


HELP = [
    [],
    ["distill"],
    ["compare"],
    ["evaluate"],
    ["export"],
    ["quickstart"],
    ["methods"],
    ["methods", "ls"],
    ["methods", "show"],
    ["recipes"],
    ["recipes", "ls"],
    ["recipes", "show"],
    ["recipes", "copy"],
    ["env"],
]


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_every_help_page_ends_with_examples(command: list[str], kdtool) -> None:
    done = kdtool(*command, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\nExamples:\n  kdtool " in done.stdout
    assert "\x1b" not in done.stdout


def test_help_names_the_exit_codes(kdtool) -> None:
    page = kdtool("--help").stdout
    for code in ("0  done", "3  a quality bar", "5  out of memory", "130  interrupted"):
        assert f"  {code}" in page


def test_help_has_panels(kdtool) -> None:
    page = kdtool("distill", "-h").stdout
    panels = ["Model", "Data", "Method", "Optimisation", "Output", "Hub", "Dangerous"]
    positions = [page.index(f"\n{panel}:\n") for panel in panels]
    assert positions == sorted(positions)
    assert "--trust-remote-code" in page[positions[-1] :]


COMPLETED = {
    "commands": ("kdtool di", ["distill"]),
    "methods": ("kdtool distill t --method k", ["kd"]),
    "benchmarks": ("kdtool evaluate m --benchmark bank", ["banking77"]),
    "formats": ("kdtool export m --format safe", ["safetensors"]),
    "recipes": ("kdtool recipes show quickstart-s", ["quickstart-stories"]),
    "plug-ins": ("kdtool methods show accur", ["accuracy"]),
    "options": ("kdtool distill --fine", ["--fine-tune-teacher"]),
}


@pytest.mark.parametrize("case", COMPLETED)
def test_completion(case: str, process) -> None:
    words, expected = COMPLETED[case]
    env = {"_KDTOOL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = process(env=env)
    assert done.stderr == ""
    found = done.stdout.split()
    assert set(expected) <= set(found)
    assert all(word.startswith(words.split()[-1]) for word in found)
