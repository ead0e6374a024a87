"""`compress`: a model made smaller out of its own weights, stage by stage, each held against the one before."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdtool.card import write_card
from kdtool.compressors._base import Context
from kdtool.config import before_recovery, stages
from kdtool.data.examples import DataSplits, Examples
from kdtool.errors import QualityProblem, UsageProblem
from kdtool.models import Loaded, load, load_model
from kdtool.pipelines import setup
from kdtool.pipelines.distill import get_ready, make_views, train
from kdtool.pipelines.finished import read_proof
from kdtool.pipelines.measured import check_metrics
from kdtool.pipelines.output import Output
from kdtool.pipelines.probe import probe_batches
from kdtool.pipelines.prove import compare, weight_bytes
from kdtool.pipelines.push import check_push, push
from kdtool.pipelines.search import Found, Plan, search
from kdtool.pipelines.stages import Standing, record
from kdtool.pipelines.streamed import run_streamed, wanted
from kdtool.proof import Proof, Result, Side, Table
from kdtool.registry import COMPRESSORS, check_fit
from kdtool.report import write_manifest, write_report
from kdtool.report._frontier import frontier_section
from kdtool.report._markdown import markdown_table
from kdtool.run import Run
from kdtool.saving import save_model
from kdtool.sections import RunConfig
from kdtool.tasks._base import Batch, Task
from kdtool.train.loop import History
from kdtool.verify import reload_check
from kdtool.writing import typed

_CALIBRATION_ROWS = 128
_CALIBRATION_BATCH = 16


@dataclass(slots=True)
class _Source:
    """What a run starts from."""

    task: Task
    loaded: Loaded
    data: DataSplits | None
    test: Examples | None
    start: Standing


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
    memo: dict[str, Any] | None = {} if config.search.budget is not None else None
    if config.data.source is None:
        return _Source(task, loaded, None, None, Standing(loaded, Context(task, None, run, memo=memo), probes))
    data = setup.get_data(config, task, run)
    setup.relabel(data, loaded, config, run)
    encoded = setup.encode(task, data, loaded, None, config, run)
    rows = encoded.train if encoded.train is not None else encoded.test
    views = make_views(config, task, encoded.train, loaded, None) if _trains(config) else None
    batches = calibration_batches(task, rows)
    context = Context(task, batches, run, encoded.train, config.train, views=views, memo=memo)
    return _Source(task, loaded, data, encoded.test, Standing(loaded, context, probes))


def calibration_batches(task: Task, rows: Examples) -> list[Batch]:
    """The first rows, with their labels where there are some."""
    rows = rows.select(range(min(len(rows), _CALIBRATION_ROWS)))
    starts = range(0, len(rows), _CALIBRATION_BATCH)
    parts = [range(at, min(at + _CALIBRATION_BATCH, len(rows))) for at in starts]
    return [task.collate([rows[i] for i in part]) for part in parts]


def _apply(standing: Standing, plan: Plan, run: Run, checkpoints: Path) -> tuple[Standing, list[dict[str, Any]]]:
    """Stages in turn, with a record of each.

    Raises:
        KdtoolError: a stage cannot work on the model, or makes it collapse.
    """
    records = []
    for name, values in plan:
        run.reporter.info(f"{name}: {standing.loaded.parameters:,} parameters")
        before = replace(standing, context=replace(standing.context, checkpoints=checkpoints / name))
        after = before.through(name, values)
        records.append(record(name, before, after))
        standing = after
    return standing, records


def _planned(source: _Source, config: RunConfig, run: Run) -> tuple[Plan, Found | None]:
    """The stages with their settings, searched for where a budget is given."""
    if config.search.budget is None:
        return stages(config), None
    context = source.start.context
    if context.batches is None:
        context = replace(context, batches=list(source.start.probes))
    found = search(replace(source.start, context=context), config, run)
    source.start.context.memo.clear()  # type: ignore[union-attr] # there is one where there is a budget
    return found.plan, found


def _recovered(made: Loaded, config: RunConfig, run: Run, output: Output) -> tuple[Loaded, History]:
    """The compressed model, distilled back from the model it was made of by the loop of `distill`."""
    folder, facts = output.work / "compressed", dict(made.facts)  # saving in another number format notes that one
    save_model(made, folder, config.output.model_copy(update={"dtype": "float32"}))
    again = config.model_copy(deep=True)
    again.command, again.student.model = "distill", str(folder)
    again.method = {"name": config.recover.method, **config.recover.settings}
    again.train.max_steps = config.recover.steps
    ready = get_ready(again, run)
    history = train(ready, again, run, output)
    config.train.lr = again.train.lr
    return Loaded(ready.student.model, made.processor, made.ref, None, None, facts), history


def _prove(source: _Source, saved: Loaded, config: RunConfig, run: Run) -> Proof:
    """Benchmark before and after where there is data; sizes alone where there is none."""
    if source.test is None or source.data is None:
        pair = (saved, source.loaded)
        after, before = (Side(m.ref, m.revision, m.parameters, weight_bytes(m.folder), {}) for m in pair)
        return Proof(after, before)
    if saved.processor is source.loaded.processor:
        return compare(source.task, saved, source.loaded, source.test, config, run)
    own = source.task.encode(source.data.test, saved, config, run)
    return compare(source.task, saved, source.loaded, own, config, run, teacher_data=source.test)


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
        if wanted(config, run):
            proof, facts = run_streamed(config, run, output, began)
            return _conclude(config, run, output, proof, facts, began)
        source = _start(config, run)
        plan, found = _planned(source, config, run)
        first = before_recovery([name for name, _ in plan]) if config.recover.steps is not None else len(plan)
        made, records = _apply(source.start, plan[:first], run, output.checkpoints)
        history = History(steps=0)
        if config.recover.steps is not None:
            loaded, history = _recovered(made.loaded, config, run, output)
            made = replace(made, loaded=loaded)
        made, more = _apply(made, plan[first:], run, output.checkpoints)
        records += more
        facts = {"task": source.task.name, "stages": records, "steps": history.steps + _trained(records)}
        if found is not None:
            facts["search"] = {"budget": found.budget, "points": found.points, "settings": dict(plan)}
        proof = _finish(source, made, history, config, run, output, facts, began)
    except BaseException:
        output.release()
        raise
    return _conclude(config, run, output, proof, facts, began)


def _finish(
    source: _Source,
    made: Standing,
    history: History,
    config: RunConfig,
    run: Run,
    output: Output,
    facts: dict[str, Any],
    began: float,
) -> Proof:
    """Save, reload, measure, document, and move everything into place."""
    task, staging, loaded = source.task, output.staging, made.loaded
    save_model(loaded, staging, config.output)
    reload: dict[str, Any] = {}
    if config.eval.reload:
        run.reporter.info("reloading the result in a fresh process")
        reload = reload_check(staging, task, loaded.model, made.probes[0], run.trust_remote_code)
    model = load(staging, task.name, run).float()
    saved = Loaded(model, loaded.processor, str(output.folder), None, staging, loaded.facts)
    proof = _prove(source, saved, config, run)
    proof.reload = reload
    recovered = {"method": config.recover.method, "steps": history.steps} if history.steps else None
    section = _section(facts["stages"], recovered)
    if "search" in facts:
        section += frontier_section(staging, facts["search"]["points"], facts["search"]["budget"], config.output.plots)
    write_report(staging, proof, [], config, config.output.plots and source.test is not None, section)
    command = run.provenance.get("command", "")
    write_card(staging, proof, config, {"task": task.name, "labels": loaded.labels, "command_line": command})
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
    extra |= {key: facts[key] for key in ("search", "checked") if key in facts}
    if config.output.push is not None:
        extra["push"] = push(config, run, output.folder, proof)
    if not proof.reload.get("passed", True):
        raise QualityProblem(
            f"the model in {output.folder} does not reproduce its outputs after reloading",
            why=f"largest difference {proof.reload.get('max_abs_diff', math.nan):.2e}",
        )
    data = config.data.source or "DATA"
    extra["next"] = f"kdtool evaluate {output.folder} --teacher {config.teacher.model} --data {data}"
    return Result("compress", output.folder, proof, time.perf_counter() - began, facts["steps"], extra)
