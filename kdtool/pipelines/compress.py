"""`compress`: a model made smaller out of its own weights, stage by stage, each held against the one before."""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdtool.card import write_card
from kdtool.compressors._base import Context
from kdtool.config import RunConfig, stages
from kdtool.data.examples import Examples
from kdtool.errors import KdtoolError, QualityProblem, UsageProblem
from kdtool.models import Loaded, load, load_model
from kdtool.pipelines import setup
from kdtool.pipelines.distill import get_ready, make_views, train
from kdtool.pipelines.finished import read_proof
from kdtool.pipelines.measured import check_metrics
from kdtool.pipelines.output import Output
from kdtool.pipelines.probe import probe_batches
from kdtool.pipelines.prove import compare, weight_bytes
from kdtool.pipelines.push import check_push, push
from kdtool.proof import Proof, Result, Side, Table
from kdtool.registry import COMPRESSORS, check_fit
from kdtool.report import write_manifest, write_report
from kdtool.report._markdown import markdown_table
from kdtool.run import Run
from kdtool.saving import save_model
from kdtool.tasks._base import Batch, Task
from kdtool.train.loop import History
from kdtool.verify import outputs, reload_check
from kdtool.writing import typed

_CALIBRATION_ROWS = 128
_CALIBRATION_BATCH = 16
_COLLAPSED = 1e-3
"""Outputs have collapsed when they differ among inputs by less than this share of what they did before."""
_UNITS = 2
"""Least number of units among which a spread is judged."""


@dataclass(slots=True)
class _Source:
    """What a run starts from."""

    task: Task
    loaded: Loaded
    train: Examples | None
    test: Examples | None
    calibration: list[Batch] | None
    probes: list[Batch]


def _start(config: RunConfig, run: Run) -> _Source:
    """Load the model, and where data is named its rows.

    Raises:
        KdtoolError: anything that does not fit.
    """
    reference = config.teacher.model
    assert reference is not None
    task = setup.pick_task(config, reference, run)
    check_metrics(config, task)
    for name, _ in stages(config):
        check_fit(name, task.name, COMPRESSORS)
    loaded = load_model(reference, task.auto_class, run, "model")
    setup.check_trained(loaded, "model")
    setup.load_processor(loaded, task, run)
    probes = probe_batches(task, loaded, config, run)
    if config.data.source is None:
        return _Source(task, loaded, None, None, None, probes)
    data = setup.get_data(config, task, run)
    setup.relabel(data, loaded, config, run)
    encoded = setup.encode(task, data, loaded, None, config, run)
    rows = encoded.train if encoded.train is not None else encoded.test
    rows = rows.select(range(min(len(rows), _CALIBRATION_ROWS)))
    starts = range(0, len(rows), _CALIBRATION_BATCH)
    parts = [rows.select(range(at, min(at + _CALIBRATION_BATCH, len(rows)))) for at in starts]
    batches = [task.example_inputs(part, len(part)) for part in parts]
    return _Source(task, loaded, encoded.train, encoded.test, batches, probes)


def _check_forward(
    name: str, task: Task, before: Loaded, after: Loaded, probes: Sequence[Batch]
) -> dict[str, float | None]:
    """Hold a stage's outputs against those of the model before it.

    Returns:
        `relative_error` (norm of the differences by norm of the outputs) and `agreement` (share of units
        with the same largest logit).

    Raises:
        KdtoolError: the outputs are not finite, or the same whatever the input.
    """
    old = torch.cat([outputs(task, before.model, probe) for probe in probes])
    new = torch.cat([outputs(task, after.model, probe) for probe in probes])
    why = None
    if not torch.isfinite(new).all():
        why = "its outputs are not finite"
    elif len(new) >= _UNITS and float(new.std(0).norm()) < _COLLAPSED * float(old.std(0).norm()):
        why = "it gives the same outputs whatever the input"
    if why is not None:
        raise KdtoolError(f"the model collapsed in the stage '{name}'", why=why, hint="keep more of it")
    error = float((new - old).norm() / old.norm().clamp_min(1e-12))
    return {"relative_error": error, "agreement": float((new.argmax(-1) == old.argmax(-1)).double().mean())}


def _apply(source: _Source, config: RunConfig, run: Run, output: Output) -> tuple[Loaded, list[dict[str, Any]]]:
    """All stages in turn, with a record of each."""
    views = make_views(config, source.task, source.train, source.loaded, None) if _trains(config) else None
    context = Context(source.task, source.calibration, run, source.train, config.train, views=views)
    current, records = source.loaded, []
    for name, values in stages(config):
        run.reporter.info(f"{name}: {current.parameters:,} parameters")
        own = dataclasses.replace(context, checkpoints=output.checkpoints / name)
        made: Loaded = COMPRESSORS.get(name)(current, COMPRESSORS.build_config(name, values), own)
        made.facts["stages"] = [*current.facts.get("stages", ()), name]
        checked = _check_forward(name, source.task, current, made, source.probes)
        facts = {k: v for k, v in made.facts.items() if k not in ("new_weights", "dtype", "stages")}
        records.append({"name": name, "parameters": made.parameters, **checked, "made": facts})
        current = made
    return current, records


def _recovered(made: Loaded, config: RunConfig, run: Run, output: Output) -> tuple[Loaded, History]:
    """The compressed model, distilled back from the model it was made of by the loop of `distill`."""
    folder = output.work / "compressed"
    save_model(made, folder, config.output.model_copy(update={"dtype": "float32"}))
    again = config.model_copy(deep=True)
    again.command, again.student.model = "distill", str(folder)
    again.method = {"name": config.recover.method}
    again.train.max_steps = config.recover.steps
    ready = get_ready(again, run)
    history = train(ready, again, run, output)
    config.train.lr = again.train.lr
    facts = made.facts
    return Loaded(ready.student.model, made.processor, made.ref, None, None, facts), history


def _prove(source: _Source, saved: Loaded, config: RunConfig, run: Run) -> Proof:
    """Benchmark before and after where there is data; sizes alone where there is none."""
    if source.test is not None:
        return compare(source.task, saved, source.loaded, source.test, config, run)
    after, before = (Side(m.ref, m.revision, m.parameters, weight_bytes(m.folder), {}) for m in (saved, source.loaded))
    return Proof(after, before)


def _trains(config: RunConfig) -> bool:
    return any(COMPRESSORS.info(name).facts.get("trains") for name, _ in stages(config))


def _trained(records: Sequence[dict[str, Any]]) -> int:
    """Optimiser steps of the stages themselves."""
    return sum(record["made"].get("steps", 0) for record in records)


def _section(records: Sequence[dict[str, Any]], recover: dict[str, Any] | None) -> list[str]:
    """The stages, as a section of the report."""
    rows = [
        [r["name"], f"{r['parameters']:,}", f"{r['relative_error']:.3g}", f"{100 * r['agreement']:.1f} %"]
        for r in records
    ]
    if recover is not None:
        rows.append([f"recovery by {recover['method']}, {recover['steps']} steps", "-", "-", "-"])
    header = ["stage", "parameters", "change of the outputs", "same largest logit"]
    note = "Each against the model before it: norm of the differences of the outputs by norm of the outputs."
    more = [f"- {record['made']['note']}" for record in records if "note" in record["made"]]
    return ["## Stages", "", markdown_table(Table(header, rows)), "", note, "", *([*more, ""] if more else [])]


def compress(config: RunConfig, run: Run | None = None) -> Result:
    """Make a model smaller out of its own weights, and prove what that cost.

    Args:
        config: `teacher.model` is the model, `method` the compressors and their settings.
        run: Context (default: made from the configuration, silent).

    Returns:
        What was made and measured; `gates_missed` names gates that did not pass.

    Raises:
        KdtoolError: its children say what went wrong; a stage that collapsed leaves nothing behind.
    """
    began = time.perf_counter()
    run = run or setup.make_run(config)
    asked = config.model_copy(deep=True)
    if config.teacher.model is None or config.output.folder is None or not stages(config):
        raise UsageProblem("compress needs a model, a method and an output folder")
    check_push(config, run)
    setup.begin(config, run)
    setup.apply_benchmark(config)
    output = Output(Path(config.output.folder).expanduser(), asked)
    if output.complete:
        proof, manifest = read_proof(output.folder)
        return _conclude(config, run, output, proof, manifest, began)
    try:
        source = _start(config, run)
        made, records = _apply(source, config, run, output)
        history = History(steps=0)
        if config.recover.steps is not None:
            made, history = _recovered(made, config, run, output)
        facts = {"task": source.task.name, "stages": records, "steps": history.steps + _trained(records)}
        proof = _finish(source, made, history, config, run, output, facts, began)
    except BaseException:
        output.release()
        raise
    return _conclude(config, run, output, proof, facts, began)


def _finish(
    source: _Source,
    made: Loaded,
    history: History,
    config: RunConfig,
    run: Run,
    output: Output,
    facts: dict[str, Any],
    began: float,
) -> Proof:
    """Save, reload, measure, document, and move everything into place."""
    task, staging = source.task, output.staging
    save_model(made, staging, config.output)
    reload: dict[str, Any] = {}
    if config.eval.reload:
        run.reporter.info("reloading the result in a fresh process")
        reload = reload_check(staging, task, made.model, source.probes[0], run.trust_remote_code)
    model = load(staging, task.name, run).float()
    proof = _prove(source, Loaded(model, made.processor, str(output.folder), None, staging, made.facts), config, run)
    proof.reload = reload
    recovered = {"method": config.recover.method, "steps": history.steps} if history.steps else None
    section = _section(facts["stages"], recovered)
    write_report(staging, proof, [], config, config.output.plots and source.test is not None, section)
    command = run.provenance.get("command", "")
    write_card(staging, proof, config, {"task": task.name, "labels": made.labels, "command_line": command})
    extra = {**facts, "recovery": recovered, "seconds": time.perf_counter() - began}
    write_manifest(staging, config, proof, run, typed(command or "kdtool compress -c kdtool.json"), extra)
    output.commit()
    return proof


def _conclude(config: RunConfig, run: Run, output: Output, proof: Proof, facts: dict[str, Any], began: float) -> Result:
    """Publish if asked to, and say how it went.

    Raises:
        QualityProblem: the saved model does not reproduce its outputs.
    """
    extra = {"task": facts["task"], "method": config.method_name, "stages": facts["stages"]}
    if config.output.push is not None:
        extra["push"] = push(config, run, output.folder, proof)
    if not proof.reload.get("passed", True):
        raise QualityProblem(
            f"the model in {output.folder} does not reproduce its outputs after reloading",
            why=f"largest difference {proof.reload.get('max_abs_diff', math.nan):.2e}",
        )
    extra["next"] = f"kdtool evaluate {output.folder} --teacher {config.teacher.model} --data DATA"
    return Result("compress", output.folder, proof, time.perf_counter() - began, facts["steps"], extra)
