"""`kdtool quickstart`: the main job on data that comes with the package."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from kdtool.cli import options as o
from kdtool.cli.launch import command_line, prepare_environment, show_result
from kdtool.cli.pages import CONTEXT, Command, examples
from kdtool.cli.session import Session

SUMMARY = "Distil a real model in minutes, without downloads."
EXAMPLES = examples("kdtool quickstart", "kdtool quickstart intents -o ./intents")

Name = Annotated[
    Literal["stories", "intents"],
    typer.Argument(metavar="[stories|intents]", help="Which one: a small story writer, or a classifier of requests."),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("quickstart", cls=Command, short_help=SUMMARY, epilog=EXAMPLES, context_settings=dict(CONTEXT))(
        quickstart
    )


def quickstart(
    ctx: typer.Context,
    name: Name = "stories",
    output: o.Output = None,
    seed: o.Seed = None,
    device: o.Device = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> None:
    """Distil a real model on real data in minutes, without downloading anything."""
    from kdtool.cli.checks import check_device, check_output
    from kdtool.config import load_config

    session: Session = ctx.obj
    console = session.settle(json=json, quiet=quiet, verbose=verbose)
    folder = output or free_folder(f"quickstart-{name}")
    given = {"runtime.seed": seed, "runtime.device": device, "runtime.offline": True}
    config = load_config("distill", options={**given, "output.folder": str(folder)})
    session.config = config
    check_device(config)
    check_output(config)
    prepare_environment(config, console.verbosity)
    with contextlib.redirect_stdout(sys.stderr):
        from kdtool import pipelines
        from kdtool.pipelines.setup import make_run

        result = pipelines.quickstart(name, make_run(config, console, command_line(session)), folder)
    if console.mode == "human":
        for title, text in result.extra.get("stories", {}).items():
            console.print(f"The {title} writes: {text}\n")
        console.table(result.extra.get("comparison", []))
        console.print("")
    show_result("quickstart", result, console)


def free_folder(name: str) -> Path:
    """A folder of that name here, numbered when there is one: a first try must not end in a refusal."""
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    return next(path for path in map(Path, names) if not path.exists())
