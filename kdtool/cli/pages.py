"""Help pages: options in named panels and examples at the end, with rich or without."""

import inspect
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
"""Context settings of every command."""


def examples(*lines: str) -> str:
    """Make the end of a help page; a double line break is what rich keeps as a break."""
    return "\n\n".join(["Examples:", *lines])


def _write_panels(params: list[Any], ctx: Any, formatter: Any) -> None:
    panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for param in params:
        record = param.get_help_record(ctx)
        if record is not None:
            default = "Arguments" if param.param_type_name == "argument" else "Options"
            panels.setdefault(getattr(param, "rich_help_panel", None) or default, []).append(record)
    for title, records in panels.items():
        if records:
            with formatter.section(title):
                formatter.write_dl(records)


def _write_epilog(epilog: str | None, formatter: Any) -> None:
    """Write titles (ending in a colon) and sentences (ending in a full stop) flush, all else indented.

    Not with the formatter's `write_text`: it would wrap commands that are there to be copied.
    """
    for line in inspect.cleandoc(epilog or "").split("\n\n"):
        flush = line.endswith((":", "."))
        formatter.write(f"\n{line}\n" if flush else f"  {line}\n")


class Command(TyperCommand):
    """A command whose plain help page keeps panels and examples."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write options panel by panel."""
        _write_panels(self.get_params(ctx), ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples line by line."""
        _write_epilog(self.epilog, formatter)


class Group(TyperGroup):
    """A group of commands whose plain help page keeps its examples."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, then the options."""
        self.format_commands(ctx, formatter)
        _write_panels(self.get_params(ctx), ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples line by line."""
        _write_epilog(self.epilog, formatter)


def group(text: str, *lines: str) -> typer.Typer:
    """Make a group of subcommands.

    Args:
        text: What the group is for.
        lines: Example commands.
    """
    return typer.Typer(
        cls=Group, help=text, epilog=examples(*lines), no_args_is_help=True, context_settings=dict(CONTEXT)
    )
