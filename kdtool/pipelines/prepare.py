"""What a method makes before it trains: files of rows in the work folder, kept with the result."""

import contextlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from kdtool.authors import Author, EndpointAuthor, LocalAuthor, ServedAuthor
from kdtool.data.examples import DataSplits, Examples
from kdtool.data.readers import file_sha256
from kdtool.endpoint import EndpointRef
from kdtool.endpoint.serving import Serving, program
from kdtool.errors import DataProblem, UsageProblem
from kdtool.methods._base import Method, Work
from kdtool.models import Loaded, load_model
from kdtool.pipelines import setup
from kdtool.pipelines.asking import learns_from_scores
from kdtool.registry import METHODS
from kdtool.run import Run
from kdtool.saving import save_model
from kdtool.sections import OutputSection, RunConfig, TrainSection
from kdtool.tasks._base import Task
from kdtool.tasks._language import LanguageTask
from kdtool.train import parallel
from kdtool.train.loop import Trainer
from kdtool.train.state import generators, restore_generators, seed_everything
from kdtool.writing import write_text

_LONG = "--set data.max_length=N, or --set data.long_prompts=cut"

_MADE = "kept/data"
"""Where rows are made; what `kept` holds ends in the result."""


def check_teacher(config: RunConfig) -> None:
    """Refuse an endpoint or a file as the teacher of a method that needs more of it.

    Raises:
        UsageProblem: it does, or the reference is wrong, or nothing is there for vllm to write.
    """
    facts = METHODS.info(config.method_name).facts
    _check_vllm(config)
    if config.teacher.fine_tune and (config.teacher.writes_only or not facts.get("loads_teacher", True)):
        raise UsageProblem(f"--fine-tune-teacher: {config.method_name} asks its teacher for texts", hint="leave it out")
    if not config.teacher.writes_only or facts.get("teacher_writes"):
        if EndpointRef.matches(config.teacher.model):
            EndpointRef.parse(str(config.teacher.model))
        return
    scores = learns_from_scores(config)
    if scores and config.train.teacher_cache_dir is not None and config.train.teacher_cache is not False:
        EndpointRef.parse(str(config.teacher.model))
        return
    what = "a file" if config.teacher.is_file else "an endpoint"
    fitting = [name for name in METHODS.names() if METHODS.info(name).facts.get("teacher_writes")]
    more = "; --teacher-cache FOLDER takes its likeliest tokens for kd and supervised-kd" if scores else ""
    raise UsageProblem(
        f"method {config.method_name} needs a teacher in memory, and {what} gives only texts",
        hint=f"methods that learn from texts: {', '.join(fitting)}{more}",
    )


def _check_vllm(config: RunConfig) -> None:
    """Refuse vllm where no model of this machine writes before training.

    Raises:
        UsageProblem: it does not, or vllm is not installed.
    """
    if config.teacher.generate_with != "vllm":
        return
    facts = METHODS.info(config.method_name).facts
    if not facts.get("teacher_writes"):
        fitting = [name for name in METHODS.names() if METHODS.info(name).facts.get("teacher_writes")]
        raise UsageProblem(
            f"--generate-with vllm: method {config.method_name} has no texts written before it trains",
            why="what is written meanwhile follows weights that change, and a server would keep the old ones",
            hint=f"methods whose teacher writes first: {', '.join(fitting)}",
        )
    if config.teacher.writes_only and facts.get("loads_teacher", True):
        raise UsageProblem("--generate-with vllm: the teacher is no model of this machine", hint="leave it out")
    program()


def prepared(method: Method, task: Task, data: DataSplits, config: RunConfig, run: Run, folder: Path) -> DataSplits:
    """The data that a method makes of the data; leaves the random generators where they were.

    Args:
        method: The method.
        task: Of its models.
        data: Raw data.
        config: The run's configuration.
        run: Context.
        folder: Work folder of the run.
    """
    before = generators()
    with parallel.first_alone(run):
        _renew(folder, config, data)
        with contextlib.ExitStack() as stack:
            served = config.teacher.generate_with == "vllm"
            serving = stack.enter_context(Serving(run, folder / _MADE / "vllm.log")) if served else None

            def writer(loaded: Loaded) -> Author:
                local = LocalAuthor(loaded, run, config.eval.batch_size, _prompts(task, loaded, config, run))
                return local if serving is None else ServedAuthor(local, serving)

            work = Work(
                folder / _MADE,
                config,
                run,
                cache(lambda: _teacher(task, config, run, serving)),
                writer,
                _fitting(task, data, config, run, folder, serving),
            )
            made = method.prepare(data, work)
    restore_generators(*before)
    if work.facts:
        run.provenance["stages"] = dict(work.facts)
    return made


def _renew(folder: Path, config: RunConfig, data: DataSplits) -> None:
    """Throw away what an earlier run made of other data or another teacher of the same name."""
    named = [config.teacher.model, *config.method_values.values()]
    paths = [Path(name).expanduser() for name in named if isinstance(name, str)]
    files = {str(path): file_sha256(path) for path in paths if path.is_file()}
    marks = {"data": data.provenance.get("splits"), "files": files}
    known = folder / "prepared.json"
    text = json.dumps(marks, sort_keys=True, default=str)
    if known.is_file() and known.read_text(encoding="utf-8") == text:
        return
    for old in (_MADE, "models"):
        shutil.rmtree(folder / old, ignore_errors=True)
    write_text(known, text)


def _teacher(task: Task, config: RunConfig, run: Run, serving: Serving | None) -> Author:
    """The teacher as a writer."""
    reference = str(config.teacher.model)
    if EndpointRef.matches(reference):
        return EndpointAuthor(EndpointRef.parse(reference), run)
    loaded = load_model(reference, task.auto_class, run, "teacher")
    setup.load_processor(loaded, task, run)
    local = LocalAuthor(loaded, run, config.eval.batch_size)
    return local if serving is None else ServedAuthor(local, serving)


def _prompts(task: Task, loaded: Loaded, config: RunConfig, run: Run) -> Callable[[Sequence[str]], list[list[int]]]:
    """Token ids of prompts as they are in rows to train on: all before the first that counts."""
    assert isinstance(task, LanguageTask), "only language models write"

    def ids(prompts: Sequence[str]) -> list[list[int]]:
        rows = task.encode(Examples({"prompt": list(prompts), "response": ["."] * len(prompts)}), loaded, config, run)
        if len(rows) != len(prompts):
            raise DataProblem("some questions are too long for the model that should answer them", hint=_LONG)
        return [[int(token) for token in task.prompt_of(rows[i])] for i in range(len(rows))]

    return ids


def _fitting(
    task: Task, data: DataSplits, config: RunConfig, run: Run, folder: Path, serving: Serving | None
) -> Callable[[str, Examples, TrainSection, str], Loaded]:
    """`Work.fit`."""

    def load(reference: str, name: str) -> Loaded:
        path = Path(reference).expanduser()
        if path.suffix == ".json" and path.is_file():
            return setup.described(path, task, data, config, run)
        loaded = load_model(reference, task.auto_class, run, name)
        setup.load_processor(loaded, task, run)
        return loaded

    def fit(reference: str, rows: Examples, settings: TrainSection, name: str) -> Loaded:
        kept = folder / "models" / name
        if (kept / "config.json").is_file():
            again = load(str(kept), name)
            again.ref = reference
            return again
        if serving is not None:
            serving.end()  # the device is needed here
        seed_everything(run.seed)
        loaded = load(reference, name)
        if settings.epochs:
            encoded = task.encode(rows, loaded, config, run)
            method = METHODS.get("none")(METHODS.build_config("none", {}), loaded, [], task)
            run.reporter.info(f"training the {name} ({loaded.parameters:,} parameters) on {len(encoded)} rows")
            checkpoints = folder / "models" / f"{name}-checkpoints"
            alone = replace(run, world=1)  # the other processes wait, and read what this one made
            Trainer(method, encoded, settings, alone, setup.is_head_of(loaded.model), checkpoints).train()
            shutil.rmtree(checkpoints, ignore_errors=True)
        _keep(loaded, kept)
        loaded.folder = kept
        return loaded

    return fit


def _keep(loaded: Loaded, folder: Path) -> None:
    """Save a model in one rename."""
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    save_model(loaded, partial, OutputSection(dtype="float32"))
    partial.rename(folder)
