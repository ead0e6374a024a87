"""Measuring two models side by side, and writing what came out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kdtool import gates
from kdtool.data.examples import Examples
from kdtool.metrics import agreement, fit_temperature, reliability_bins, score
from kdtool.models import Loaded
from kdtool.proof import Proof, Side, retention
from kdtool.run import Run
from kdtool.sections import RunConfig
from kdtool.tasks._base import Evaluation, Task
from kdtool.verify import latency


def weight_bytes(folder: Path | None) -> int:
    """Size of the weight files in a folder; 0 without one."""
    if folder is None or not folder.is_dir():
        return 0
    for patterns in (("*.safetensors",), ("*.onnx", "*.onnx.data", "*.onnx_data"), ("openvino_model.*",), ("*.bin",)):
        size = sum(path.stat().st_size for pattern in patterns for path in folder.glob(pattern))
        if size:
            return size
    return 0


def model_bytes(loaded: Loaded) -> int:
    """Size of a model's weight files, or of its weights in memory when it has no files."""
    return weight_bytes(loaded.folder) or sum(p.numel() * p.element_size() for p in loaded.model.parameters())


_CALIBRATION = ("ece", "adaptive-ece", "classwise-ece", "mce", "nll", "brier")


def scaling(
    task: Task,
    loaded: Loaded,
    found: Evaluation,
    validation: Examples | None,
    config: RunConfig,
    run: Run,
    teacher: int | None = None,
) -> dict[str, Any]:
    """Temperature scaling (Guo et al. 2017, arXiv:1706.04599): T fitted on validation rows, judged on the test rows.

    T minimises the negative log-likelihood of the validation rows; without any there is nothing to fit it on.

    Returns:
        `temperature`, `rows`, and the calibration metrics `before` and `after`; empty where it does not apply.
    """
    if config.eval.temperature_scaling == "off" or not validation or found.logits is None or found.labels is None:
        return {}
    seen = task.evaluate(loaded.model, validation, run, [], config.eval.batch_size, teacher)
    assert seen.logits is not None
    assert seen.labels is not None
    temperature = fit_temperature(seen.logits, seen.labels)
    before, _ = score(_CALIBRATION, found.logits, found.labels, resamples=0)
    after, _ = score(_CALIBRATION, found.logits / temperature, found.labels, resamples=0)
    return {"temperature": temperature, "rows": len(validation), "before": before, "after": after}


def measure(
    task: Task,
    loaded: Loaded,
    data: Examples,
    config: RunConfig,
    run: Run,
    teacher: int | None = None,
    validation: Examples | None = None,
) -> tuple[Side, Evaluation]:
    """Score one model on the test rows; validation rows serve only to fit a temperature."""
    names = config.eval.metrics or list(task.metrics)
    model = loaded.model.to(run.device)
    found = task.evaluate(model, data, run, names, config.eval.batch_size, teacher)
    bins = (
        reliability_bins(found.logits, found.labels) if found.logits is not None and found.labels is not None else None
    )
    side = Side(
        name=loaded.ref,
        revision=loaded.revision,
        parameters=loaded.parameters,
        bytes=model_bytes(loaded),
        metrics=found.metrics,
        errors=found.errors,
        reliability=bins,
        scaling=scaling(task, loaded, found, validation, config, run, teacher),
    )
    return side, found


def agree(side: Side, student: Evaluation, teacher: Evaluation, names: Sequence[str]) -> None:
    """Note how often student and teacher rank the same class or token first, where that is asked for.

    Models with different tokenizers rank different tokens, and at different places.
    """
    if teacher.predictions is None:
        return
    for name in names:
        if name.replace("_", "-") == "agreement" and student.predictions is not None and student.units is not None:
            value, error = agreement.measured(student.predictions, teacher.predictions, student.units)
            side.metrics[name], side.errors[name] = value, error


def compare(
    task: Task,
    student: Loaded,
    teacher: Loaded | None,
    data: Examples,
    config: RunConfig,
    run: Run,
    validation: Examples | None = None,
    teacher_data: Examples | None = None,
) -> Proof:
    """Score and time the student, and the teacher beside it; with validation rows also their temperatures.

    With `teacher_data` the teacher sees those rows, encoded for it alone, instead of its view of `data`.
    """
    say = run.reporter.info
    say(f"scoring on {len(data)} test rows")
    left, seen = measure(task, student, data, config, run, None, validation)
    right = None
    if teacher is not None:
        rows, view = (data, 0) if teacher_data is None else (teacher_data, None)
        if teacher_data is not None:
            task.remember(teacher, config)  # what it writes is read with its own tokenizer
        right, beside = measure(task, teacher, rows, config, run, view, validation)
        if teacher_data is not None:
            task.remember(student, config)
        if teacher_data is None or task.classifies:  # else their tokens are not the same
            agree(left, seen, beside, config.eval.metrics or task.metrics)
    proof = Proof(left, right)
    if right is not None:
        proof.retention = retention(left.metrics, right.metrics)
    if config.eval.latency:
        _time(task, student, teacher, data, config, run, proof, teacher_data)
    proof.gates = [
        gates.check(gate, left.metrics, right.metrics if right else None, proof.retention)
        for gate in gates.parse_gates(config.eval.fail_under)
    ]
    return proof


def _time(
    task: Task,
    student: Loaded,
    teacher: Loaded | None,
    data: Examples,
    config: RunConfig,
    run: Run,
    proof: Proof,
    teacher_data: Examples | None = None,
) -> None:
    sizes: Sequence[int] = config.eval.latency_batches
    repeats = config.eval.latency_repeats
    batches = {size: task.example_inputs(data, size) for size in sizes}
    models: dict[str, torch.nn.Module] = {"student": student.model}
    views = {"student": batches}
    if teacher is not None:
        models["teacher"] = teacher.model
        rows, view = (data, 0) if teacher_data is None else (teacher_data, None)
        views["teacher"] = {size: task.example_inputs(rows, size, view) for size in sizes}
    timed = latency(task, models, views, repeats, run.device)
    proof.student.latency = timed["student"]
    if proof.teacher is not None:
        proof.teacher.latency = timed["teacher"]
        proof.latency_ratio = {
            size: timed["teacher"][size]["median_ms"] / timed["student"][size]["median_ms"] for size in sizes
        }


def facts_of(loaded: Loaded) -> dict[str, Any]:
    """What the model card says about a model beyond the proof."""
    return {"revision": loaded.revision, **{k: v for k, v in loaded.facts.items() if k != "new_weights"}}
