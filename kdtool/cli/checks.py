"""What can be known to be wrong before anything heavy is imported."""

import os
import re
from pathlib import Path

from kdtool import benchmarks
from kdtool.config import before_recovery, stages
from kdtool.errors import OutputProblem, UsageProblem, nearest
from kdtool.gates import parse_budget, parse_drops, parse_gates
from kdtool.registry import ATTENTION, COMPRESSORS, EXPORTERS, METHODS, TASKS, check_fit
from kdtool.sections import RunConfig
from kdtool.variants import variants_of

MARKER = ".kdtool/run.json"
"""File by which an output folder is known to hold an unfinished run; the pipeline decides whether it is this one."""

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def check(config: RunConfig) -> None:
    """Check a configuration for its command.

    Raises:
        UsageProblem: something is missing, unknown, or does not fit the rest.
        OutputProblem: the output folder cannot be written.
    """
    check_device(config)
    if config.data.task is not None:
        TASKS.check(config.data.task)
    parse_gates(config.eval.fail_under)
    _check_benchmark(config)
    kinds = {
        "distill": _check_distill,
        "compare": _check_compare,
        "compress": _check_compress,
        "evaluate": _check_evaluate,
        "export": _check_export,
        "patch-attention": _check_patch,
    }
    kinds[config.command](config)
    if config.command != "compare":  # a comparison goes on in the folder it left
        check_output(config)
    _check_push(config)


def check_device(config: RunConfig) -> None:
    """Refuse a device name that cannot be one."""
    if not _DEVICE.fullmatch(config.runtime.device):
        raise UsageProblem(f"unknown device '{config.runtime.device}'", hint="one of auto, cpu, cuda, cuda:N, mps")


def _check_distill(config: RunConfig) -> None:
    name = config.method_name
    if not name:
        raise UsageProblem("no method given", hint="add --method NAME; see: kdtool methods ls")
    facts = METHODS.info(name).facts
    fewest, most = facts.get("teachers", (1, 1))
    if config.teacher.cache is not None and (config.teacher.model is not None or config.command == "compare"):
        raise UsageProblem("a cache stands for the only teacher of a run", hint="kdtool distill cache:FOLDER ...")
    if config.teacher.model is None and config.teacher.cache is None and fewest > 0:
        raise UsageProblem("no teacher given", hint="kdtool distill TEACHER --student MODEL ...")
    if config.teacher.model is not None and most == 0 and config.command == "distill":
        raise UsageProblem(
            f"method '{name}' takes no teacher",
            why="the student learns from itself",
            hint=f"kdtool distill --student MODEL --method {name} ...",
        )
    if config.student.model is None:
        raise UsageProblem("no student given", hint="add --student MODEL, such as a folder, a Hub id or layers:4")
    if config.data.source is None and config.eval.benchmark is None:
        raise UsageProblem("no data given", hint="add --data DATA: a Hub id, folder, file or shipped set")
    if config.data.task is not None:
        check_fit(name, config.data.task)
    _need_output(config)


def _check_compare(config: RunConfig) -> None:
    """As for `distill`, for each of several methods."""
    if not config.method_name:
        _check_distill(config)
    for variant in variants_of(config):
        one = config.model_copy(deep=True)
        one.method = dict(variant.method)
        _check_distill(one)


def _check_compress(config: RunConfig) -> None:
    names = [COMPRESSORS.check(name) for name, _ in stages(config)]
    if not names:
        raise UsageProblem("no method given", hint=f"add --method {'|'.join(COMPRESSORS.names())}")
    if config.teacher.model is None:
        raise UsageProblem("no model given", hint="kdtool compress MODEL --method NAME -o FOLDER")
    has_data = config.data.source is not None or config.eval.benchmark is not None
    METHODS.check(config.recover.method)
    for name in names:
        facts = COMPRESSORS.info(name).facts
        if not has_data and (facts.get("trains") or facts.get("needs_data")):
            does = "trains on" if facts.get("trains") else "looks at"
            raise UsageProblem(f"{name} {does} data", hint="add --data DATA")
        if config.data.task is not None:
            check_fit(name, config.data.task, COMPRESSORS)
    if config.search.budget is not None:
        parse_budget(config.search.budget)
        searched = [name for name in COMPRESSORS.names() if COMPRESSORS.info(name).facts.get("dials")]
        if not set(names) & set(searched):
            raise UsageProblem(
                f"--budget: {config.method_name} has no setting to search",
                hint=f"those that have: {', '.join(searched)}",
            )
    if config.recover.steps is not None and not before_recovery(names):
        raise UsageProblem(
            f"--recover has nothing to recover from before {names[0]}",
            why=f"training would undo what {names[0]} does, or does not concern it",
            hint=f"leave --recover out, or put a stage before it: --method layers,{names[0]}",
        )
    if config.recover.steps is not None and not has_data:
        raise UsageProblem("--recover trains on data", hint="add --data DATA")
    if config.eval.fail_under and not has_data:
        raise UsageProblem("--fail-under needs something to measure on", hint="add --data DATA")
    if config.recover.steps is not None and config.data.task is not None:
        check_fit(config.recover.method, config.data.task)
    _need_output(config)


def _check_evaluate(config: RunConfig) -> None:
    if config.student.model is None:
        raise UsageProblem("no model given", hint="kdtool evaluate MODEL --data DATA")
    if config.data.source is None and config.eval.benchmark is None:
        raise UsageProblem("nothing to evaluate on", hint="add --benchmark NAME or --data DATA")


def _check_export(config: RunConfig) -> None:
    if config.teacher.model is None:
        raise UsageProblem("no model given", hint="kdtool export MODEL --format NAME -o FOLDER")
    EXPORTERS.check(config.output.format)
    _need_output(config)


def _check_patch(config: RunConfig) -> None:
    if config.teacher.model is None:
        raise UsageProblem("no model given", hint="kdtool patch-attention MODEL --data DATA -o FOLDER")
    ATTENTION.check(config.method_name)
    if config.method_name == "exact":
        raise UsageProblem("--method exact is what the model has already", hint="such as --method cluster")
    if config.data.source is None and config.eval.benchmark is None and config.patch.calibrate is None:
        raise UsageProblem("no data given", hint="add --data DATA or --benchmark NAME")
    parse_drops(config.patch.max_drop)
    _need_output(config)


def _check_benchmark(config: RunConfig) -> None:
    name = config.eval.benchmark
    if name is not None and not name.startswith(benchmarks.HARNESS) and name not in benchmarks.names():
        raise UsageProblem(f"unknown benchmark '{name}'", hint=nearest(name, benchmarks.names()))


def _need_output(config: RunConfig) -> None:
    if config.output.folder is None:
        raise UsageProblem("no output folder given", hint="add -o FOLDER")


def check_output(config: RunConfig) -> None:
    """Refuse an output folder that holds something else, or an input, or cannot be written."""
    if config.output.folder is None:
        return
    folder = Path(config.output.folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageProblem(f"output '{folder}' is a file", hint="give a folder with -o")
    _check_not_an_input(config, folder)
    cache = config.train.teacher_cache_dir
    if cache is not None and Path(cache).expanduser().resolve() == folder.resolve():
        # the files of a cache would be taken for old weights, and removed
        raise UsageProblem(f"output folder '{folder}' is the folder of the teacher cache", hint="give another with -o")
    # `.kdtool` alone is an unfinished run, or what a kill left of claiming the folder
    filled = folder.is_dir() and any(path.name != MARKER.partition("/")[0] for path in folder.iterdir())
    if filled and not config.output.overwrite and not (folder / MARKER).is_file():
        raise UsageProblem(f"output folder '{folder}' is not empty", hint="add --overwrite, or give another -o")
    existing = next((parent for parent in (folder, *folder.absolute().parents) if parent.exists()), None)
    if existing is not None and not os.access(existing, os.W_OK):
        raise OutputProblem(f"output folder '{folder}' cannot be written", why=f"no write permission in {existing}")


def _check_not_an_input(config: RunConfig, folder: Path) -> None:
    """Refuse to replace what the run reads, or a folder around it."""
    target = folder.resolve()
    for what, given in (
        ("teacher", config.teacher.model),
        ("student", config.student.model),
        ("data", config.data.source),
        ("data", config.patch.calibrate),
    ):
        source = Path(given).expanduser() if given else None
        if source is not None and source.exists() and source.resolve().is_relative_to(target):
            raise UsageProblem(
                f"output folder '{folder}' holds the {what} '{given}'", hint="give another folder with -o"
            )


def _check_push(config: RunConfig) -> None:
    if config.output.push is None:
        return
    if not _REPO_ID.fullmatch(config.output.push):
        raise UsageProblem(f"'{config.output.push}' is not a repository id", hint="such as --push owner/name")
    if config.runtime.offline:
        raise UsageProblem("--push cannot work with --offline", hint="leave one of them out")
