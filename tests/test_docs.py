"""The documentation says what is true: generated parts are fresh, commands exist, pages are there."""

import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from kdtool.cli.app import build
from kdtool.config import key_paths
from kdtool.errors import KdtoolError
from kdtool.registry import ATTENTION, COMPRESSORS, METHODS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
_CODE = re.compile(r"```(?:bash|sh)\n(.*?)```", re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)")


def each_page(function):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())(function)


def test_generated_parts_are_fresh():
    done = subprocess.run([sys.executable, str(DOCS / "generate.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("key", key_paths())
def test_every_configuration_key_is_documented(key):
    section = key.partition(".")[0]
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert f"`{key}`" in page or section in ("command", "method")


@pytest.mark.parametrize(
    ("folder", "registry", "name"),
    [(f, r, n) for f, r in (("methods", METHODS), ("compressors", COMPRESSORS)) for n in r.names()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pages_of_plugins_name_the_paper_and_every_setting(folder, registry, name):
    page = (DOCS / folder / f"{name}.md").read_text(encoding="utf-8")
    for heading in ("**Paper**", "## Settings", "## When to use it", "## Pitfalls"):
        assert heading in page
    for setting in registry.info(name).settings:
        assert f"`method.{setting.name}`" in page
    number = re.search(r"arXiv:[\d.]+\d", registry.info(name).facts["paper"])
    assert number is None or number[0] in page


@pytest.mark.parametrize("name", ATTENTION.names())
def test_operator_pages_name_the_paper_and_every_setting(name):
    page = (DOCS / "attention" / f"{name}.md").read_text(encoding="utf-8")
    for heading in ("**Paper**", "## Settings", "## When to use it", "## Pitfalls"):
        assert heading in page
    for setting in ATTENTION.info(name).settings:
        assert f"`method.{setting.name}`" in page
    number = re.search(r"arXiv:? ?(\d+\.\d+)", ATTENTION.info(name).facts["paper"])
    assert number is None or number[1] in page


@cache
def flags_of(words: tuple[str, ...]) -> set[str]:
    """Options of a command, through its groups."""
    command = build()
    for word in words:
        command = command.commands[word]
    return {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)} | {"-h", "--help"}


def command_lines(page: Path) -> list[list[str]]:
    """Words of every kdtool command in the page's shell blocks."""
    found = []
    for text in _CODE.findall(page.read_text(encoding="utf-8")):
        for line in text.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\||[|;>]", line):
                words = shlex.split(part, comments=True)
                if words and Path(words[0]).name == "kdtool":
                    found.append(words[1:])
    return found


@each_page
def test_commands_in_the_page_exist(page):
    for words in command_lines(page):
        path: tuple[str, ...] = ()
        command = build()
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands or words[0].startswith("-"), words
            if words[0].startswith("-"):
                break
            path, command, words = (*path, words[0]), command.commands[words[0]], words[1:]
        known = flags_of(path)
        for word in words:
            if word.startswith("-") and not word.lstrip("-")[:1].isdigit():
                assert word.partition("=")[0] in known, f"kdtool {' '.join(path)} has no {word}"


@each_page
def test_configuration_files_in_the_page_are_valid(page, tmp_path):
    from kdtool.config import load_config

    for text in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        path = tmp_path / "page.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            load_config("distill", path)
        except KdtoolError as error:
            pytest.fail(f"{error.message} {error.hint}")


@each_page
def test_links_lead_somewhere(page):
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_method_in_the_guide_works(tmp_path):
    text = (DOCS / "extending.md").read_text(encoding="utf-8")
    path = tmp_path / "my_kd.py"
    path.write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("my_kd", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["my_kd"] = module
    try:
        spec.loader.exec_module(module)
        assert module.Config().temperature == 2.0
        assert {"terms", "paper", "tasks"} <= set(vars(module.Method))
    finally:
        del sys.modules["my_kd"]
