"""`evaluate`: a benchmark, a model, and beside it a teacher."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdtool.errors import UsageProblem
from kdtool.pipelines import lengths, setup
from kdtool.pipelines.harness import is_harness, score
from kdtool.pipelines.measured import check_metrics
from kdtool.pipelines.prove import compare
from kdtool.proof import Proof, Result
from kdtool.report import write_report
from kdtool.run import Run
from kdtool.runtime_onnx import load_for_scoring
from kdtool.sections import RunConfig


def evaluate(config: RunConfig, run: Run | None = None) -> Result:
    """Score a model on a benchmark or data set, with a teacher beside it if one is named.

    Args:
        config: `student.model` is the model, `teacher.model` what it is held against.
        run: Context (default: made from the configuration, silent).

    Raises:
        KdtoolError: its children say what went wrong.
    """
    began = time.perf_counter()
    run = run or setup.make_run(config)
    setup.begin(config, run)
    if config.student.model is None:
        raise UsageProblem("no model given", hint="kdtool evaluate MODEL --data DATA")
    if is_harness(config):
        if config.eval.lengths:
            raise UsageProblem("--lengths needs rows to read", hint="--data DATA, or a benchmark of kdtool's own")
        proof, name = score(config, run)
        main = next(iter(proof.student.metrics), "")
        return _result(config, proof, {"task": name, "data": {"source": config.eval.benchmark}, "main": main}, began)
    setup.apply_benchmark(config)
    task = setup.pick_task(config, config.student.model, run)
    check_metrics(config, task)
    data = setup.get_data(config, task, run, score_only=True)
    model = load_for_scoring(config.student.model, task.auto_class, run, "model")
    setup.load_processor(model, task, run)
    setup.check_trained(model, "model")
    setup.relabel(data, model, config, run)
    teacher = None
    if config.teacher.model is not None:
        teacher = load_for_scoring(config.teacher.model, task.auto_class, run, "teacher")
        setup.load_processor(teacher, task, run)
        setup.check_trained(teacher)
        setup.check_same_classes(model, teacher)
    notes = lengths.check(task, [model] if teacher is None else [model, teacher], config.eval.lengths)
    encoded = setup.encode(task, data, model, teacher, config, run)
    proof = compare(task, model, teacher, encoded.test, config, run, encoded.validation)
    real = lengths.measure(task, model, teacher, encoded.test, config, run, proof)
    extra = {
        "task": task.name,
        "data": {"source": config.data.source, "rows": len(encoded.test), **_pinned(run)},
        "main": (config.eval.metrics or list(task.metrics))[0],
    }
    section: list[str] = []
    if config.eval.lengths:
        notes += lengths.notes_on(proof, real)
        extra["lengths"] = lengths.as_json(proof, real, notes)
        section = lengths.section(notes)
        for note in notes:
            run.reporter.info(note)
    return _result(config, proof, extra, began, section)


def _result(
    config: RunConfig, proof: Proof, extra: dict[str, Any], began: float, section: Sequence[str] = ()
) -> Result:
    """What was found, written to the output folder where there is one."""
    output = Path(config.output.folder).expanduser() if config.output.folder else None
    result = Result("evaluate", output, proof, time.perf_counter() - began, None, extra)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_report(output, proof, [], config, config.output.plots, section)
        (output / "result.json").write_text(json.dumps(result.as_json(), indent=2) + "\n", encoding="utf-8")
    return result


def _pinned(run: Run) -> dict[str, object]:
    data = run.provenance.get("data", {})
    return {"revision": data["revision"]} if data.get("revision") else {}
