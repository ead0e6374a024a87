"""`kdtool recipes`: configurations that come with the package, to copy and edit."""

from pathlib import Path
from typing import Annotated

import typer

from kdtool.cli import complete
from kdtool.cli import options as o
from kdtool.cli.pages import CONTEXT, Command, examples, group
from kdtool.errors import UsageProblem

LS_EXAMPLES = examples("kdtool recipes ls")
SHOW_EXAMPLES = examples("kdtool recipes show quickstart-intents", "kdtool recipes show quickstart-intents > mine.yaml")
COPY_EXAMPLES = examples("kdtool recipes copy quickstart-intents mine.yaml", "kdtool distill -c mine.yaml")

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a recipe.", autocompletion=complete.recipes)]
Target = Annotated[Path, typer.Argument(metavar="PATH", help="File to write, or the folder to write NAME.yaml in.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    recipes = group(
        "List, show and copy ready-made configurations.", "kdtool recipes ls", "kdtool recipes copy NAME mine.yaml"
    )
    recipes.command("ls", cls=Command, epilog=LS_EXAMPLES, context_settings=dict(CONTEXT))(ls)
    recipes.command("show", cls=Command, epilog=SHOW_EXAMPLES, context_settings=dict(CONTEXT))(show)
    recipes.command("copy", cls=Command, epilog=COPY_EXAMPLES, context_settings=dict(CONTEXT))(copy)
    app.add_typer(recipes, name="recipes")


def ls(ctx: typer.Context, json: o.Json = False, quiet: o.Quiet = False) -> None:
    """List the recipes."""
    from kdtool import recipes

    console = ctx.obj.settle(json=json, quiet=quiet)
    found = {name: recipes.summary(name) for name in recipes.names()}
    if console.mode == "json":
        console.answer({"command": "recipes ls", "recipes": found})
    elif console.mode == "quiet":
        console.print("\n".join(found))
    else:
        width = max((len(name) for name in found), default=0)
        lines = [f"{name.ljust(width)}  {text}" for name, text in found.items()]
        console.print("\n".join([*lines, "", "Copy one and edit it: kdtool recipes copy NAME PATH"]))


def show(ctx: typer.Context, name: Name, json: o.Json = False) -> None:
    """Print a recipe."""
    from kdtool import recipes

    console = ctx.obj.settle(json=json, quiet=False)
    text = recipes.read(name)
    if console.mode == "json":
        answer = {"command": "recipes show", "name": name, "summary": recipes.summary(name), "text": text}
        console.answer(answer)
    else:
        console.print(text.rstrip("\n"))


def copy(
    ctx: typer.Context,
    name: Name,
    path: Target,
    overwrite: o.Overwrite = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Copy a recipe, to edit it."""
    from kdtool import recipes

    console = ctx.obj.settle(json=json, quiet=quiet)
    text = recipes.read(name)
    target = path / f"{name}.yaml" if path.is_dir() else path
    if target.exists() and not overwrite:
        raise UsageProblem(f"{target} exists", hint="add --overwrite, or give another PATH")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    if console.mode == "json":
        console.answer({"command": "recipes copy", "name": name, "output": str(target)})
    elif console.mode == "quiet":
        console.print(str(target))
    else:
        console.print(f"Copied {name} to {target}\nNext: kdtool {recipes.command(name)} -c {target}")
