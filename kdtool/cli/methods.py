"""`kdtool methods`: every plug-in of every kind, read without importing it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdtool.cli import complete
from kdtool.cli import options as o
from kdtool.cli.pages import CONTEXT, Command, examples, group
from kdtool.errors import UsageProblem, nearest

if TYPE_CHECKING:
    from kdtool.registry import Plugin, Setting

LS_EXAMPLES = examples("kdtool methods ls", "kdtool methods ls --json")
SHOW_EXAMPLES = examples("kdtool methods show kd", "kdtool methods show text-classification --json")

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of a plug-in of any kind.", autocompletion=complete.plugins)
]


def register(app: typer.Typer) -> None:
    """Add the group."""
    methods = group(
        "List and explain methods, tasks, metrics and formats.", "kdtool methods ls", "kdtool methods show kd"
    )
    methods.command("ls", cls=Command, epilog=LS_EXAMPLES, context_settings=dict(CONTEXT))(ls)
    methods.command("show", cls=Command, epilog=SHOW_EXAMPLES, context_settings=dict(CONTEXT))(show)
    app.add_typer(methods, name="methods")


def ls(ctx: typer.Context, json: o.Json = False, quiet: o.Quiet = False) -> None:
    """List the plug-ins of all kinds: distillation methods, tasks, metrics, export formats."""
    from kdtool.registry import ALL

    console = ctx.obj.settle(json=json, quiet=quiet)
    listed = {kind: {name: registry.info(name) for name in registry.names()} for kind, registry in ALL.items()}
    if console.mode == "json":
        facts = {kind: {name: _facts(plugin) for name, plugin in found.items()} for kind, found in listed.items()}
        console.answer({"command": "methods ls", "plugins": facts})
        return
    if console.mode == "quiet":
        console.print("\n".join(name for found in listed.values() for name in found))
        return
    width = max((len(name) for found in listed.values() for name in found), default=0)
    blocks = [
        "\n".join([kind, *(f"  {name.ljust(width)}  {plugin.summary}" for name, plugin in found.items())])
        for kind, found in listed.items()
        if found
    ]
    console.print("\n\n".join([*blocks, "Settings and paper of one: kdtool methods show NAME"]))


def show(ctx: typer.Context, name: Name, json: o.Json = False, quiet: o.Quiet = False) -> None:
    """Explain a plug-in: what it does, its settings with defaults, its tasks, its paper."""
    console = ctx.obj.settle(json=json, quiet=quiet)
    found = find(name)
    if console.mode == "json":
        plugins = [{"kind": kind, "name": plugin.name, **_facts(plugin), **_details(plugin)} for kind, plugin in found]
        console.answer({"command": "methods show", "plugins": plugins})
    elif console.mode == "quiet":
        console.print("\n".join(setting.name for _, plugin in found for setting in plugin.settings))
    else:
        console.print("\n\n".join("\n".join(_page(kind, plugin)) for kind, plugin in found))


def find(name: str) -> "list[tuple[str, Plugin]]":
    """All plug-ins of a name, with the word for their kind.

    Raises:
        UsageProblem: there is none; the hint names the nearest.
    """
    from kdtool.registry import ALL

    found = [(registry.kind, registry.info(name)) for registry in ALL.values() if name in registry.names()]
    if not found:
        known = {other for registry in ALL.values() for other in registry.names()}
        raise UsageProblem(f"nothing is named '{name}'", hint=f"{nearest(name, known)} See: kdtool methods ls")
    return found


def _facts(plugin: "Plugin") -> dict[str, Any]:
    facts = plugin.facts
    return {
        "summary": plugin.summary,
        "paper": facts.get("paper") or None,
        "tasks": sorted(facts.get("tasks", ())),
    }


def _details(plugin: "Plugin") -> dict[str, Any]:
    settings = [
        {
            "name": setting.name,
            "type": setting.annotation,
            "default": None if setting.required else setting.default,
            "required": setting.required,
            "doc": setting.doc,
        }
        for setting in plugin.settings
    ]
    return {"doc": plugin.doc, "settings": settings}


def _page(kind: str, plugin: "Plugin") -> Iterator[str]:
    facts = _facts(plugin)
    yield f"{plugin.name} ({kind})"
    yield ""
    yield plugin.doc.strip() or "No description."
    if facts["paper"]:
        yield f"\nPaper: {facts['paper']}"
    if facts["tasks"]:
        yield f"\nTasks: {', '.join(facts['tasks'])}"
    if plugin.settings:
        yield "\nSettings (--set method.NAME=VALUE):"
        for setting in plugin.settings:
            yield f"  {setting.name} = {_default(setting)}  ({setting.annotation})"
            if setting.doc:
                yield f"      {setting.doc}"
    if kind == "compressor":
        yield f"\nUse it: kdtool compress MODEL --method {plugin.name} -o FOLDER"
    if kind == "method":
        yield f"\nUse it: kdtool distill TEACHER --student MODEL --method {plugin.name} --data DATA -o FOLDER"


def _default(setting: "Setting") -> str:
    if setting.required:
        return "required"
    value = setting.default
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)
