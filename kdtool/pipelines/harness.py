"""`--benchmark lm-eval:TASK`: a language model scored by lm-evaluation-harness, alone or beside its teacher."""

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdtool import gates
from kdtool.benchmarks import HARNESS
from kdtool.errors import DataProblem, UsageProblem, nearest
from kdtool.models import Loaded, load_model
from kdtool.pipelines import setup
from kdtool.pipelines.prove import model_bytes
from kdtool.proof import Proof, Side, retention
from kdtool.run import Run
from kdtool.sections import RunConfig

_RESAMPLES = 1000
_CODE = "!function"
"""By this tag a task's file names Python code."""


def is_harness(config: RunConfig) -> bool:
    """Whether the benchmark is one of lm-evaluation-harness."""
    return (config.eval.benchmark or "").startswith(HARNESS)


def score(config: RunConfig, run: Run) -> tuple[Proof, str]:
    """Score `student.model`, and `teacher.model` where there is one.

    Returns:
        The proof, and the name of the task of kdtool.

    Raises:
        UsageProblem: the harness is missing, there is no such task, or it brings code.
        DataProblem: the harness cannot get or read the data.
    """
    named = str(config.eval.benchmark).removeprefix(HARNESS)
    task = setup.pick_task(config, config.student.model, run)
    if not task.writes:
        raise UsageProblem(f"lm-eval scores language models that write, and {task.name} does not")
    with _quiet(run) as library:
        manager, names = _found(library, named, run)
    sides = []
    for reference, what in ((config.student.model, "model"), (config.teacher.model, "teacher")):
        if reference is not None:
            loaded = load_model(reference, task.auto_class, run, what)
            setup.load_processor(loaded, task, run)
            setup.check_trained(loaded, what)
            run.reporter.info(f"scoring {what} '{reference}' by lm-eval on {', '.join(names)}")
            with _quiet(run) as library:
                sides.append(_side(library, loaded, manager, names, config, run))
    proof = Proof(sides[0], sides[1] if len(sides) > 1 else None)
    if proof.teacher is not None:
        proof.retention = retention(proof.student.metrics, proof.teacher.metrics)
    beside = proof.teacher.metrics if proof.teacher else None
    for gate in gates.parse_gates(config.eval.fail_under, also=proof.student.metrics):
        proof.gates.append(gates.check(gate, proof.student.metrics, beside, proof.retention))
    return proof, task.name


@contextlib.contextmanager
def _quiet(run: Run) -> Iterator[Any]:
    """The library, without its bars and warnings; offline where the run is.

    Raises:
        UsageProblem: it is not installed.
    """
    kept = {name: os.environ.get(name) for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")}
    if run.offline:
        os.environ |= dict.fromkeys(kept, "1")
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            import lm_eval
            import lm_eval.models.huggingface
            import lm_eval.tasks
        except ModuleNotFoundError as error:
            hint = "pip install 'kdtool[lm-eval]'"
            raise UsageProblem("--benchmark lm-eval:... needs lm-eval", why=str(error), hint=hint) from None
        logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
        try:
            yield lm_eval
        finally:
            for name, value in kept.items():
                os.environ.pop(name, None)
                os.environ |= {} if value is None else {name: value}


def _found(library: Any, named: str, run: Run) -> tuple[Any, list[str]]:
    """What finds tasks, and the task's name: one that comes with the library, or of a YAML file.

    Raises:
        UsageProblem: there is no such task, or its file names code that is not trusted.
    """
    path = Path(named).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        manager = library.tasks.TaskManager()
        if named not in manager.all_tasks:
            raise UsageProblem(f"lm-eval has no task '{named}'", hint=nearest(named, manager.all_tasks))
        return manager, [named]
    if not path.is_file():
        raise UsageProblem(f"task file {path} does not exist")
    text = path.read_text(encoding="utf-8")
    if _CODE in text and not run.trust_remote_code:
        raise UsageProblem(
            f"task file {path} names Python code ({_CODE})", hint="read it, and trust it with --trust-remote-code"
        )
    lines = [line.partition(":") for line in text.splitlines()]
    name = next((value.strip().strip("'\"") for key, _, value in lines if key == "task"), "")
    manager = library.tasks.TaskManager(include_path=str(path.parent), include_defaults=False)
    if name not in manager.all_tasks:
        raise UsageProblem(f"{path} describes no task of lm-eval", hint="its first lines name one: task: NAME")
    return manager, [name]


def _side(library: Any, loaded: Loaded, manager: Any, names: list[str], config: RunConfig, run: Run) -> Side:
    """Metrics of one model, named as the harness does; of several tasks with the task in front.

    Raises:
        DataProblem: whatever the harness raises.
    """
    model = loaded.model.to(run.device).eval()
    try:
        wrapped = library.models.huggingface.HFLM(
            pretrained=model, tokenizer=loaded.processor, batch_size=config.eval.batch_size, device=run.device
        )
        found = library.simple_evaluate(
            model=wrapped,
            tasks=names,
            task_manager=manager,
            limit=config.data.test_limit,
            bootstrap_iters=_RESAMPLES,
            log_samples=False,
            random_seed=run.seed,
            numpy_random_seed=run.seed,
            torch_random_seed=run.seed,
            fewshot_random_seed=run.seed,
        )
    except Exception as error:  # noqa: BLE001 - tasks are programs and raise what they like
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataProblem(f"lm-eval cannot score '{loaded.ref}' on {names[0]}", why=why) from None
    values, errors = _figures(found["results"])
    return Side(loaded.ref, loaded.revision, loaded.parameters, model_bytes(loaded), values, errors)


def _figures(results: dict[str, dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Values and standard errors of `metric,filter` entries; the filter `none` is left out of the name."""
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for task, row in results.items():
        front = f"{task}/" if len(results) > 1 else ""
        for key, value in row.items():
            metric, comma, kind = key.partition(",")
            if not comma or not isinstance(value, int | float):
                continue
            end = "" if kind == "none" else f"-{kind}"
            if metric.endswith("_stderr"):
                errors[front + metric.removesuffix("_stderr") + end] = float(value)
            else:
                values[front + metric + end] = float(value)
    return values, {name: error for name, error in errors.items() if math.isfinite(error)}
