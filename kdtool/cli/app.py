"""The command line as a whole: builds the parser, runs it, turns every exception into an exit code."""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.main import get_command

from kdtool import __version__
from kdtool.cli import (
    compare,
    compress,
    distill,
    env,
    evaluate,
    export,
    methods,
    pages,
    patch_attention,
    quickstart,
    recipes,
)
from kdtool.cli.console import is_plain
from kdtool.cli.failures import explain
from kdtool.cli.session import Session

EPILOG = "\n\n".join(
    [
        "Examples:",
        "kdtool quickstart",
        "kdtool distill ./teacher --student layers:4 --method kd --data ./reviews.jsonl -o ./student",
        "kdtool evaluate ./student --teacher ./teacher --data ./reviews.jsonl",
        "Exit codes:",
        "0  done",
        "1  failed while working",
        "2  wrong usage or configuration",
        "3  a quality bar was missed; the result is kept and named",
        "4  Hub or network",
        "5  out of memory",
        "130  interrupted; a checkpoint was written first",
        "Every option can also be given in the environment: --max-steps as KDTOOL_MAX_STEPS.",
    ]
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kdtool {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
]


def root(version: Version = False) -> None:
    """Make pretrained models smaller and faster, and prove what that cost."""


def build(rich: bool = False) -> Any:
    """Build the parser.

    Args:
        rich: Draw help pages with rich; it costs 0.1 s, so only where someone looks at one.
    """
    app = typer.Typer(
        cls=pages.Group,
        epilog=EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        suggest_commands=False,
        rich_markup_mode="rich" if rich else None,
        context_settings=dict(pages.CONTEXT),
    )
    app.callback(cls=pages.Group, epilog=EPILOG, no_args_is_help=True, context_settings=dict(pages.CONTEXT))(root)
    shown = (distill, compare, compress, patch_attention, evaluate, export, methods, recipes, quickstart, env)
    for module in shown:
        module.register(app)
    return get_command(app)


def run(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name (default: those of the process).

    Returns:
        The exit code, as documented in `kdtool --help`.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "_KDTOOL_COMPLETE" in os.environ:
        build().main(args=arguments, prog_name="kdtool")
    session = Session.begin(arguments)
    try:
        with _terminate_like_interrupt():
            return _invoke(arguments, session)
    except BrokenPipeError:
        # The reader has gone, as in `kdtool methods ls | head`; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseException as error:  # noqa: BLE001 - the one place where exceptions become exit codes
        problem = explain(error, session)
        session.console.close()
        if session.debug and not isinstance(error, typer.TyperException):
            traceback.print_exception(error)
        session.console.fail(problem)
        return problem.exit_code
    finally:
        session.console.close()


def _invoke(arguments: list[str], session: Session) -> int:
    """Parse and run; exceptions pass through."""
    asks_for_help = "--help" in arguments or "-h" in arguments
    command = build(rich=asks_for_help and not is_plain(sys.stdout))
    if not arguments:
        with command.context_class(command, info_name="kdtool", **pages.CONTEXT) as context:
            print(command.get_help(context), file=sys.stderr)
        return 2
    try:
        with command.make_context("kdtool", arguments, obj=session) as context:
            command.invoke(context)
    except typer.Exit as ended:
        return ended.exit_code
    return 0


@contextlib.contextmanager
def _terminate_like_interrupt() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that a checkpoint is written first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
