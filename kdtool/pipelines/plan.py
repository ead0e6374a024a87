"""`--dry-run`: what a run would do and need, before any weights are loaded."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import transformers

from kdtool.config import stages
from kdtool.data.examples import Examples
from kdtool.derive import depth_of, layer_indices
from kdtool.hub import ModelRef, fetch_config
from kdtool.modeling.compressed import weights_of
from kdtool.models import Loaded, auto_class, plain_model_errors, read_config
from kdtool.pipelines import setup
from kdtool.pipelines.estimate import (
    Size,
    estimate,
    estimate_stage,
    size_of,
    tokens_of,
    training_stage,
    without_layers,
)
from kdtool.pipelines.harness import is_harness
from kdtool.pipelines.measured import check_metrics
from kdtool.pipelines.prepare import check_teacher
from kdtool.pipelines.push import check_push
from kdtool.registry import COMPRESSORS, METHODS
from kdtool.run import Run
from kdtool.sections import RunConfig
from kdtool.tasks._base import Task


def _shape(reference: str, task: Task, run: Run) -> tuple[int, str | None, Any]:
    """Parameters, commit and configuration of a model, from its config.json alone."""
    path = Path(reference).expanduser()
    revision = None
    if path.suffix == ".json" and path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
    else:
        ref = ModelRef.parse(reference)
        folder, revision = (ref.folder, None) if ref.folder else fetch_config(ref, run)
        values = read_config(folder, reference)
    values.pop("transformers_version", None)
    auto_class("AutoConfig")
    with plain_model_errors(reference), torch.device("meta"):
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        known = type(config) in auto_class(task.auto_class)._model_mapping
        model = (auto_class(task.auto_class) if known else auto_class("AutoModel")).from_config(config)
    return weights_of(model), revision, (config, model)


def plan(config: RunConfig, run: Run | None = None, processes: int = 1) -> dict[str, Any]:
    """Resolved models, data, method, steps, and estimates of memory, disk and time.

    Args:
        config: The run's configuration.
        run: Context (default: made from the configuration, silent).
        processes: How many processes would run it.

    Raises:
        KdtoolError: whatever would stop the run before it starts.
    """
    run = run or setup.make_run(config)
    run.world = max(processes, int(os.environ.get("WORLD_SIZE", "1")))
    check_push(config, run)
    if not (config.command == "evaluate" and is_harness(config)):
        setup.apply_benchmark(config)
    if config.command == "distill":
        setup.apply_method(config)
        check_teacher(config)
    task = setup.pick_task(config, setup.first_model(config), run)
    check_metrics(config, task)
    result: dict[str, Any] = {"command": config.command, "task": task.name, "device": run.device, "seed": run.seed}
    teacher: Size | None = None
    student: Size | None = None
    tokens, steps = None, 0
    if config.teacher.writes_only:
        result["teacher"] = {"name": config.teacher.model}
    elif config.teacher.model:
        count, revision, shape = _shape(config.teacher.model, task, run)
        teacher = size_of(*shape)
        result["teacher"] = {"name": config.teacher.model, "revision": revision, "parameters": count}
    if config.student.model and config.student.model.startswith("layers:") and teacher is not None:
        student = _layers(config.student.model, shape, teacher, result)
    elif config.student.model:
        count, revision, shape = _shape(config.student.model, task, run)
        student = size_of(*shape)
        result["student"] = {"name": config.student.model, "revision": revision, "parameters": count}
    if config.command == "patch-attention" and config.data.source is None:
        config.data.source = config.patch.calibrate
    if config.data.source:
        data = setup.get_data(config, task, run, score_only=config.command == "evaluate")
        rows = {
            name: len(part)
            for name, part in (("train", data.train), ("validation", data.validation), ("test", data.test))
            if part
        }
        result["data"] = {
            "source": config.data.source,
            "columns": data.roles,
            "rows": rows,
            "classes": len(data.labels or []),
        }
        if config.command == "distill" and student is not None:
            tokens = tokens_of(config, task, data.train, student)
            count = rows.get("train", 0) if tokens is None else tokens[2]
            steps = _training(config, task, count, run.world, result)
    if config.command == "patch-attention":
        result["method"] = {"name": config.method_name, **config.method_values}
        result["patch"] = config.patch.model_dump(mode="json")
    if config.command == "compress":
        result["stages"] = [{"name": name, **values} for name, values in stages(config)]
        result["recover"] = {"method": config.recover.method, "steps": config.recover.steps or 0}
        if config.search.budget is not None:
            result["budget"] = config.search.budget
    if config.command == "compress" and teacher is not None:
        result["estimate"] = _compressing(config, run, shape, data.train if config.data.source else None, task)
    else:
        result["estimate"] = estimate(config, run, student, teacher, tokens, steps)
    result["output"] = config.output.folder
    return result


def _compressing(config: RunConfig, run: Run, shape: Any, rows: Examples | None, task: Task) -> dict[str, str]:
    """Estimates for `compress`: of the stage that takes most where some train, else of the model alone."""
    size = size_of(*shape)
    loaded = Loaded(shape[1], None, str(config.teacher.model))
    tokens = tokens_of(config, task, rows, size)
    batch = config.train.batch_size * (tokens[1] if tokens else 0)
    found = []
    for name, values in stages(config):
        counted = getattr(COMPRESSORS.module(name), "training_memory", None)
        if counted is not None:
            extra = counted(loaded, COMPRESSORS.build_config(name, values), batch)
            found.append(training_stage(config, run, size, tokens, extra))
    if not found:
        return estimate(config, run, None, size, None, 0)
    return estimate_stage(size, max(found, key=lambda parts: sum(parts.values())))


def _layers(spec: str, shape: Any, teacher: Size, result: dict[str, Any]) -> Size:
    model_config, model = shape
    depth, stack = depth_of(model_config, model)
    chosen = layer_indices(spec, depth)
    each = sum(p.numel() for p in model.get_submodule(stack)[0].parameters())
    student = without_layers(teacher, (depth - len(chosen)) * each, len(chosen))
    result["student"] = {"name": spec, "layers": chosen, "parameters": student.parameters}
    return student


def _training(config: RunConfig, task: Task, rows: int, processes: int, result: dict[str, Any]) -> int:
    """Note method and training; gives the number of steps."""
    train = config.train
    settings = METHODS.build_config(config.method_name, config.method_values)
    values = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    per_epoch = math.ceil(rows / (train.batch_size * processes))
    steps = train.max_steps or max(1, math.ceil(train.epochs * per_epoch / train.grad_accum))
    result["method"] = {"name": config.method_name, **values}
    result["training"] = {
        "steps": steps,
        "batch_size": train.batch_size,
        "grad_accum": train.grad_accum,
        "lr": train.lr or task.default_lr,
        "schedule": train.schedule,
        "processes": processes,
    }
    return steps
