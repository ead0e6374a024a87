"""Plug-ins by file name: listed and described from source, imported only on use.

A plug-in is one Python file in a plug-in folder, or an entry point of another package in the
group of that folder. Everything but `Registry.get` is torch-free: names, summaries, settings and
declared facts are read from the file's syntax tree.
"""

import ast
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from kdtool.errors import UsageProblem, nearest


@dataclass(frozen=True, slots=True)
class Setting:
    """One hyper-parameter of a plug-in, as declared in its `Config` dataclass."""

    name: str
    annotation: str
    default: Any
    doc: str
    required: bool = False


@dataclass(frozen=True, slots=True)
class Plugin:
    """What is known of a plug-in without importing it."""

    name: str
    module: str
    source: Path
    doc: str
    settings: tuple[Setting, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """First line of the module's docstring."""
        return self.doc.split("\n", 1)[0].strip()


def _literal(node: ast.expr | None) -> Any:
    """Value of a literal expression; `frozenset({...})` and `frozenset()` count as literals."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "frozenset":
        return frozenset(ast.literal_eval(node.args[0])) if node.args else frozenset()
    if node is None:
        raise ValueError("no value")
    return ast.literal_eval(node)


def _settings(body: list[ast.stmt]) -> tuple[Setting, ...]:
    """Fields of a dataclass body; a string after a field is that field's description."""
    found: list[Setting] = []
    for position, statement in enumerate(body):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        doc = ""
        following = body[position + 1] if position + 1 < len(body) else None
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            doc = " ".join(str(following.value.value).split())
        required = statement.value is None
        value = None if required else _literal(statement.value)
        found.append(Setting(statement.target.id, ast.unparse(statement.annotation), value, doc, required))
    return tuple(found)


def _facts(body: list[ast.stmt]) -> dict[str, Any]:
    """Literal class attributes, such as `paper`, `tasks`, `teachers`."""
    facts: dict[str, Any] = {}
    for statement in body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            target, value = statement.target.id, statement.value
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            target, value = statement.targets[0].id, statement.value
        else:
            continue
        try:
            facts[target] = _literal(value)
        except (ValueError, TypeError, SyntaxError):
            continue
    return facts


def _with_inherited(node: ast.ClassDef, source: Path) -> tuple[Setting, ...]:
    """Fields of a `Config`, after those of a base class in a private file beside it (`_terms.TermConfig`)."""
    own = _settings(node.body)
    inherited: list[Setting] = []
    for base in node.bases:
        if isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name):
            tree = ast.parse((source.parent / f"{base.value.id}.py").read_text(encoding="utf-8"))
            found = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == base.attr), None)
            inherited += _settings(found.body) if found else []
    names = {setting.name for setting in own}
    return (*own, *(setting for setting in inherited if setting.name not in names))


def describe(name: str, module: str, source: Path, attribute: str) -> Plugin:
    """Read one plug-in file: docstring, `Config` fields, literal attributes of `attribute` or the module."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    settings: tuple[Setting, ...] = ()
    facts = _facts(tree.body)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            settings = _with_inherited(node, source)
        elif isinstance(node, ast.ClassDef) and node.name == attribute:
            facts |= _facts(node.body)
    return Plugin(name, module, source, ast.get_docstring(tree) or "", settings, facts)


class Registry:
    """All plug-ins of one kind.

    Args:
        kind: The word used in messages, such as `method`.
        package: The package whose files are the plug-ins, such as `kdtool.methods`.
        attribute: The name each plug-in file defines, such as `Method`.
        group: Entry-point group through which other packages add plug-ins (default: the package).
    """

    def __init__(self, kind: str, package: str, attribute: str, group: str | None = None) -> None:
        self.kind = kind
        self.package = package
        self.attribute = attribute
        self.group = group or package

    @cached_property
    def _modules(self) -> dict[str, str]:
        folder = Path(__file__).parent.joinpath(*self.package.split(".")[1:])
        found = {
            path.stem.replace("_", "-"): f"{self.package}.{path.stem}"
            for path in sorted(folder.glob("*.py"))
            if not path.stem.startswith("_")
        }
        for entry in importlib.metadata.entry_points(group=self.group):
            found.setdefault(entry.name, entry.value)
        return found

    def names(self) -> list[str]:
        """Names of all plug-ins, sorted."""
        return sorted(self._modules)

    def check(self, name: str) -> str:
        """Return `name`, or raise `UsageProblem` naming the nearest plug-ins."""
        if name not in self._modules:
            raise UsageProblem(
                f"unknown {self.kind} '{name}'",
                hint=f"{nearest(name, self._modules)} See: kdtool methods ls",
            )
        return name

    @cache  # noqa: B019 - registries live as long as the process
    def info(self, name: str) -> Plugin:
        """Describe a plug-in without importing it."""
        module = self._modules[self.check(name)]
        if module.startswith("kdtool."):
            source = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
        else:
            spec = importlib.util.find_spec(module)
            if spec is None or spec.origin is None:
                raise UsageProblem(
                    f"{self.kind} '{name}' is announced by an installed package but its file is missing",
                    why=f"module {module} cannot be found",
                    hint="reinstall or remove that package",
                )
            source = Path(spec.origin)
        return describe(name, module, source, self.attribute)

    def summary(self, name: str) -> str:
        """First docstring line of a plug-in."""
        return self.info(name).summary

    def module(self, name: str) -> Any:
        """Import a plug-in and return its module."""
        return importlib.import_module(self._modules[self.check(name)])

    def get(self, name: str) -> Any:
        """Import a plug-in and return its class or function."""
        return getattr(self.module(name), self.attribute)

    def build_config(self, name: str, values: Mapping[str, Any]) -> Any:
        """Instantiate the plug-in's `Config` from values already checked by `kdtool.config`."""
        return self.module(name).Config(**values)


METHODS = Registry("method", "kdtool.methods", "Method")
COMPRESSORS = Registry("compressor", "kdtool.compressors", "compress")
ATTENTION = Registry("attention operator", "kdtool.attention", "attend")
TASKS = Registry("task", "kdtool.tasks", "Task")
METRICS = Registry("metric", "kdtool.metrics", "compute")
EXPORTERS = Registry("export format", "kdtool.exporters", "export")

ALL = {
    "methods": METHODS,
    "compressors": COMPRESSORS,
    "attention": ATTENTION,
    "tasks": TASKS,
    "metrics": METRICS,
    "exporters": EXPORTERS,
}


def check_fit(name: str, task: str, registry: Registry = METHODS) -> None:
    """Refuse a plug-in for a task that lacks what it needs; one that names no tasks fits all.

    Raises:
        UsageProblem: says why, and which fit.
    """
    facts = registry.info(name).facts
    if _fits(facts, task):
        return
    fitting = [other for other in registry.names() if _fits(registry.info(other).facts, task)]
    raise UsageProblem(
        f"{registry.kind} '{name}' does not fit task '{task}'",
        why=_misfit(facts, task),
        hint=f"{registry.kind}s for {task}: {', '.join(fitting)}" if fitting else "see: kdtool methods ls",
    )


def _fits(facts: Mapping[str, Any], task: str) -> bool:
    return task in (facts.get("tasks") or (task,))


def _misfit(facts: Mapping[str, Any], task: str) -> str:
    """Why a method does not fit a task, in one line."""
    classifies = task in TASKS.names() and TASKS.info(task).facts.get("classifies", True)
    if not classifies and all(TASKS.info(name).facts.get("classifies", True) for name in facts["tasks"]):
        return f"it compares examples, each of one class, and a unit of {task} is a token"
    if facts.get("needs"):
        return f"it needs {facts['needs']}"
    return f"it is for {', '.join(sorted(facts['tasks']))}"
