"""`--dry-run`: what a run would do and need, before any weights are loaded."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers

from kdtool.config import RunConfig
from kdtool.derive import depth_of, layer_indices
from kdtool.hub import ModelRef, fetch_config
from kdtool.models import auto_class, plain_model_errors, read_config
from kdtool.pipelines import setup
from kdtool.pipelines.push import check_push
from kdtool.registry import METHODS
from kdtool.run import Run
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
    return sum(p.numel() for p in model.parameters()), revision, (config, model)


def plan(config: RunConfig, run: Run | None = None) -> dict[str, Any]:
    """Resolved models, data, method, steps, and estimates of memory and disk.

    Raises:
        KdtoolError: whatever would stop the run before it starts.
    """
    run = run or setup.make_run(config)
    check_push(config, run)
    setup.apply_benchmark(config)
    first = config.teacher.model or config.student.model
    task = setup.pick_task(config, first, run)
    setup.check_metrics(config, task)
    result: dict[str, Any] = {"command": config.command, "task": task.name, "device": run.device, "seed": run.seed}
    teacher = student = 0
    if config.teacher.model:
        teacher, revision, shape = _shape(config.teacher.model, task, run)
        result["teacher"] = {"name": config.teacher.model, "revision": revision, "parameters": teacher}
    if config.student.model and config.student.model.startswith("layers:"):
        student = _layers(config.student.model, shape, teacher, result)
    elif config.student.model:
        student, revision, _ = _shape(config.student.model, task, run)
        result["student"] = {"name": config.student.model, "revision": revision, "parameters": student}
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
        if config.command == "distill":
            _training(config, task, rows.get("train", 0), result)
    result["estimate"] = _estimate(config, teacher, student)
    result["output"] = config.output.folder
    return result


def _layers(spec: str, shape: Any, teacher: int, result: dict[str, Any]) -> int:
    model_config, model = shape
    depth, stack = depth_of(model_config, model)
    chosen = layer_indices(spec, depth)
    each = sum(p.numel() for p in model.get_submodule(stack)[0].parameters())
    student: int = teacher - (depth - len(chosen)) * each
    result["student"] = {"name": spec, "layers": chosen, "parameters": student}
    return student


def _training(config: RunConfig, task: Task, rows: int, result: dict[str, Any]) -> None:
    train = config.train
    settings = METHODS.build_config(config.method_name, config.method_values)
    values = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    per_epoch = math.ceil(rows / train.batch_size)
    steps = train.max_steps or math.ceil(train.epochs * per_epoch / train.grad_accum)
    result["method"] = {"name": config.method_name, **values}
    result["training"] = {
        "steps": steps,
        "batch_size": train.batch_size,
        "grad_accum": train.grad_accum,
        "lr": train.lr or task.default_lr,
        "schedule": train.schedule,
    }


def _estimate(config: RunConfig, teacher: int, student: int) -> dict[str, str]:
    """Memory of weights and optimiser in float32 (activations come on top), disk of output and checkpoints."""
    training = config.command == "distill"
    memory = 4 * teacher + (16 if training else 4) * student
    disk = (4 + (2 * 12 if training else 0)) * student
    return {"memory": f"{memory / 2**20:.0f} MiB and activations", "disk": f"{disk / 2**20:.0f} MiB"}
