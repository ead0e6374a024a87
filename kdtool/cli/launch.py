"""From parsed options to a finished run: configuration, checks, environment, pipeline, result."""

import contextlib
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kdtool.cli.console import Console
from kdtool.cli.options import COMMAND_KEYS, FIRST_MODEL, KEYS
from kdtool.cli.session import Session
from kdtool.errors import QualityProblem, UsageProblem

if TYPE_CHECKING:
    from kdtool.sections import Command, RunConfig


def start(command: "Command", values: Mapping[str, Any]) -> None:
    """Run one of the heavy commands.

    Args:
        command: Name of the subcommand.
        values: Its parsed parameters by name, with the typer context under `ctx`.
    """
    context: typer.Context = values["ctx"]
    session: Session = context.obj
    console = session.settle(json=values["json"], quiet=values["quiet"], verbose=values["verbose"])
    config = build_config(command, values, context)
    session.config = config
    # Not at the top: checks need the configuration's classes, and --help must not pay for them.
    from kdtool.cli.checks import check

    check(config)
    if values.get("launcher") and values["nproc"] > 1 and not values["dry_run"] and "RANK" not in os.environ:
        from kdtool.cli.torchrun import relaunch

        relaunch(session.argv, values["nproc"])
    prepare_environment(config, console.verbosity, values.get("token"))
    # Libraries that print to standard output must not break --json.
    with contextlib.redirect_stdout(sys.stderr):
        from kdtool import pipelines
        from kdtool.pipelines.setup import make_run

        run = make_run(config, console, command_line(session))
        if values["dry_run"]:
            plan, result = pipelines.plan(config, run, values.get("nproc") or 1), None
        else:
            plan, result = None, getattr(pipelines, command.replace("-", "_"))(config, run)
    if plan is not None:
        show_plan(command, plan, console)
    else:
        show_result(command, result, console)


def build_config(command: "Command", values: Mapping[str, Any], context: typer.Context) -> "RunConfig":
    """Merge file, `--set` and options into the configuration of a command."""
    from kdtool.config import load_config

    keys = {**KEYS, **COMMAND_KEYS[command]}
    overrides: list[str] = values["set_"] or []
    stated = {item.partition("=")[0].strip() for item in overrides}
    options: dict[str, Any] = {}
    for name, key in keys.items():
        value = values.get(name)
        source = context.get_parameter_source(name)
        # What is typed wins over what the environment says, also when typed as --set.
        if value is None or (source is not None and source.name == "ENVIRONMENT" and key in stated):
            continue
        options[key] = str(value) if isinstance(value, Path) else value
    if "eval.metrics" in options:
        options["eval.metrics"] = [name.strip() for name in options["eval.metrics"].split(",") if name.strip()]
    if "eval.seeds" in options:
        options["eval.seeds"] = seed_list(options["eval.seeds"])
    for key in ("patch.lengths", "eval.lengths"):
        if key in options:
            options[key] = seed_list(options[key], "--lengths")
    if values.get("no_teacher_cache"):
        options["train.teacher_cache"] = False
    config = load_config(command, values["config"], overrides, options)
    _pin(config, FIRST_MODEL[command], values.get("revision"), "--revision")
    _pin(config, "student.model", values.get("student_revision"), "--student-revision")
    return config


def seed_list(text: str, flag: str = "--seeds") -> list[int]:
    """Read `0,1,2`.

    Raises:
        UsageProblem: not of that form, or a seed twice.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts) or len(set(parts)) != len(parts):
        example = "0,1,2" if flag == "--seeds" else "512,2048"
        raise UsageProblem(f"{flag} {text}: not a list of different whole numbers", hint=f"such as {flag} {example}")
    return [int(part) for part in parts]


def _pin(config: "RunConfig", key: str, revision: str | None, flag: str) -> None:
    """Append a revision to a model."""
    if revision is None:
        return
    section = getattr(config, key.partition(".")[0])
    if section.model is None:
        raise UsageProblem(f"{flag} is given, but no model to apply it to")
    if (
        "@" in section.model
        or Path(section.model).expanduser().exists()
        or section.model.startswith(("layers:", "package:"))
    ):
        raise UsageProblem(f"{flag} does not apply to '{section.model}'", hint=f"{flag} is for a Hub id without @")
    section.model = f"{section.model}@{revision}"


def prepare_environment(config: "RunConfig", verbosity: int = 0, token: str | None = None) -> None:
    """Set the variables that libraries read when they are imported, so this comes first."""
    if config.runtime.offline:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
            os.environ[name] = "1"
    if config.runtime.cache_dir:
        os.environ["HF_HUB_CACHE"] = config.runtime.cache_dir
    if config.runtime.threads:
        # Also for the fresh process that reloads the model.
        os.environ["OMP_NUM_THREADS"] = str(config.runtime.threads)
    if token:
        os.environ["HF_TOKEN"] = token
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if verbosity == 0:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        if not sys.warnoptions:
            warnings.simplefilter("ignore")


def command_line(session: Session) -> str:
    """The command as typed, fit to be published: without a token."""
    from kdtool.writing import typed

    return typed(["kdtool", *session.argv])


def show_plan(command: str, plan: Mapping[str, Any], console: Console) -> None:
    """Print what a run would do."""
    if console.mode == "json":
        console.answer({"command": command, "plan": plan})
    else:
        console.print("\n".join(_outline(plan)))


def _outline(values: Mapping[str, Any], indent: str = "") -> list[str]:
    """Nested mappings in the manner of YAML."""
    lines: list[str] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}:", *_outline(value, indent + "  ")]
        elif isinstance(value, (list, tuple)):
            lines.append(f"{indent}{key}:")
            for item in value:
                nested = _outline(item, indent + "    ") if isinstance(item, Mapping) else [f"{indent}    {item}"]
                lines += [f"{indent}  - {nested[0].lstrip()}" if nested else f"{indent}  -", *nested[1:]]
        else:
            lines.append(f"{indent}{key}: {'-' if value is None else value}")
    return lines


def show_result(command: str, result: Any, console: Console) -> None:
    """Print the result of a run.

    Raises:
        QualityProblem: a gate was missed; raised after everything is printed.
    """
    if console.mode == "json":
        console.answer(result.as_json())
    elif console.mode == "quiet":
        number = main_number(result.as_json()) if command == "evaluate" else None
        if number is not None or result.output is not None:
            console.print(str(result.output) if number is None else f"{number:.6g}")
    else:
        console.table(result.table or result.extra.get("comparison", []))
        for line in result.lines:
            console.print(line)
    if result.gates_missed:
        kept = f"the result is kept in {result.output}" if result.output else None
        hint = "train longer, try another method, or lower --fail-under" if command == "distill" else None
        raise QualityProblem(f"missed: {', '.join(result.gates_missed)}", why=kept, hint=hint)


def main_number(values: Mapping[str, Any]) -> float | None:
    """The metric of the model that a result object calls the main one, else its first."""
    metrics: Mapping[str, float] = values.get("metrics", {}).get("student", {})
    return metrics.get(values.get("main", ""), next(iter(metrics.values()), None))
