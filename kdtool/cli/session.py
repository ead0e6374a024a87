"""What one invocation of the command line carries from parsing to the exit code."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdtool.cli.console import Console, Mode

if TYPE_CHECKING:
    from kdtool.sections import RunConfig

_FALSE = {"", "0", "false", "no", "off", "n", "f"}


def is_set(environ: Mapping[str, str], name: str) -> bool:
    """Whether a switch in the environment is on."""
    return environ.get(name, "").lower() not in _FALSE


@dataclass(slots=True)
class Session:
    """State of one invocation.

    Attributes:
        argv: Arguments after the program's name.
        console: Where everything is written.
        debug: Whether tracebacks are shown.
        config: The configuration, once it is known.
    """

    argv: tuple[str, ...]
    console: Console
    debug: bool = False
    config: "RunConfig | None" = None

    @classmethod
    def begin(cls, argv: Sequence[str], environ: Mapping[str, str] | None = None) -> "Session":
        """Start from the raw arguments, so that errors while parsing are reported as asked for."""
        environ = os.environ if environ is None else environ
        flags = argv[: argv.index("--")] if "--" in argv else argv
        mode: Mode = "json" if "--json" in flags or is_set(environ, "KDTOOL_JSON") else "human"
        debug = is_set(environ, "KDTOOL_DEBUG") or "-vv" in flags or "-vvv" in flags
        return cls(tuple(argv), Console(mode, main_process=environ.get("RANK", "0") == "0"), debug)

    def settle(self, *, json: bool, quiet: bool, verbose: int = 0) -> Console:
        """Take over the parsed output options and return the console."""
        self.console.mode = "json" if json else "quiet" if quiet else "human"
        self.console.verbosity = verbose
        self.debug = self.debug or verbose >= 2
        return self.console
