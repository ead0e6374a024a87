"""Write the parts of the documentation that the code knows better: option lists and configuration keys.

Run it after changing an option or a configuration key: `python docs/generate.py`. With `--check` it
changes nothing and exits 1 when a page is out of date, naming the page.
"""

import ast
import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}  # help pages wrap at the width of the terminal

from kdtool import sections
from kdtool.cli import app
from kdtool.registry import ATTENTION, COMPRESSORS, METHODS, Registry

DOCS = Path(__file__).parent
_BLOCK = re.compile(r"(<!-- begin: (?P<name>[\w -]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def help_text(*words: str) -> str:
    """What `kdtool WORDS --help` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        app.run([*words, "--help"])
    return printed.getvalue().strip()


def _descriptions() -> dict[str, dict[str, tuple[str, str]]]:
    """Section class to key to type and description, from the strings after the fields."""
    tree = ast.parse(Path(sections.__file__).read_text(encoding="utf-8"))
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        keys = found.setdefault(node.name, {})
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
                continue
            doc = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                doc = " ".join(str(following.value.value).split())
            keys[statement.target.id] = (_type(ast.unparse(statement.annotation)), doc)
    return found


def _type(annotation: str) -> str:
    """An annotation as users write values: `text or empty`, `adamw or sgd`."""
    words = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "None": "empty"}
    words |= {"list[str]": "list of text", "list[int]": "list of whole numbers", "dict[str, str]": "mapping"}
    parts: list[str] = []
    for part in annotation.split(" | "):
        literal = re.fullmatch(r"Literal\[(.*)\]", part)
        parts += [value.strip(" '\"") for value in literal[1].split(",")] if literal else [words.get(part, part)]
    return " or ".join(parts)


def _value(value: Any) -> str:
    """A default as it is written in YAML."""
    if value is None:
        return "-"
    text = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
    text = json.dumps(text) if "\n" in text else text
    return f"`{text}`"


def configuration() -> str:
    """A table for each section of the configuration."""
    described = _descriptions()
    lines: list[str] = []
    for name, field in sections.RunConfig.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, sections.Section)):
            continue
        lines += [f"## {name}", "", (section.__doc__ or "").strip(), "", "| key | default | values | meaning |"]
        lines.append("|---|---|---|---|")
        for key, item in section.model_fields.items():
            kind, doc = described[section.__name__][key]
            lines.append(f"| `{name}.{key}` | {_value(item.default)} | {kind} | {doc} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def settings(name: str) -> str:
    """A table of the settings of a method, a compressor or an attention operator."""
    registry = next(kind for kind in (METHODS, COMPRESSORS, ATTENTION) if name in kind.names())
    found = registry.info(name).settings
    if not found:
        return "No settings."
    rows = [f"| `method.{s.name}` | {'required' if s.required else _value(s.default)} | {s.doc} |" for s in found]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])


def index(registry: Registry) -> str:
    """One line for each plug-in of a kind."""
    rows = [f"| [`{name}`]({name}.md) | {registry.summary(name)} |" for name in registry.names()]
    return "\n".join([f"| {registry.kind} | what it does |", "|---|---|", *rows])


def block(name: str) -> str:
    """The text of a generated block, by the name in its marker."""
    kind, _, rest = name.partition(" ")
    if kind == "help":
        return f"```text\n{help_text(*rest.split())}\n```"
    if kind == "settings":
        return settings(rest)
    if kind == "configuration":
        return configuration()
    return index({"methods": METHODS, "compressors": COMPRESSORS, "attention": ATTENTION}[kind])


def render(text: str) -> str:
    """A page with its generated blocks filled in."""
    return _BLOCK.sub(lambda match: f"{match[1]}{block(match['name'])}\n{match[3]}", text)


def pages() -> list[Path]:
    """Pages with generated blocks."""
    return sorted(path for path in DOCS.rglob("*.md") if _BLOCK.search(path.read_text(encoding="utf-8")))


def main(arguments: list[str]) -> int:
    """Rewrite the pages, or with `--check` say which are out of date."""
    stale = 0
    for path in pages():
        before = path.read_text(encoding="utf-8")
        after = render(before)
        if before == after:
            continue
        stale += 1
        if "--check" in arguments:
            print(f"docs/{path.relative_to(DOCS)} is out of date; run: python docs/generate.py")
        else:
            path.write_text(after, encoding="utf-8")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
