"""Fine-tuning a teacher on the task first, cached by fingerprint."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from kdtool.data.batching import ordered_batches
from kdtool.data.examples import DataSplits, Examples
from kdtool.errors import DataProblem
from kdtool.features import head_of
from kdtool.models import Loaded, load_model
from kdtool.pipelines.setup import encode, is_head_of, load_processor
from kdtool.registry import METHODS
from kdtool.run import Run
from kdtool.saving import save_model
from kdtool.sections import OutputSection, RunConfig, TrainSection
from kdtool.tasks._base import Task, to_device
from kdtool.train import parallel
from kdtool.train.checkpoint import file_hash
from kdtool.train.loop import Trainer

_RIDGE = 1e-4
"""Weight of the squared norm in the head's fit."""


def cache_folder() -> Path:
    """Where kdtool keeps what can be made again: KDTOOL_CACHE, else the user's cache folder."""
    base = os.environ.get("KDTOOL_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kdtool"


def _fingerprint(config: RunConfig, teacher: Loaded, data: DataSplits, run: Run) -> str:
    """Hash of everything that shapes a fine-tuned teacher."""
    files = []
    if teacher.folder is not None:
        files = [
            (p.name, teacher.revision or file_hash(p))
            for p in sorted(teacher.folder.glob("*"))
            if p.suffix in {".safetensors", ".json"}
        ]
    facts = [
        config.teacher.model_dump(exclude={"model"}),
        config.train.model_dump(include={"batch_size", "weight_decay", "warmup", "clip", "buckets", "optimizer"}),
        config.data.model_dump(exclude={"test_split", "test_limit", "source"}),
        data.provenance.get("files"),
        data.provenance.get("revision"),
        data.labels,
        files,
        teacher.ref if not files else "",
        run.seed,
        run.dtype,
        torch.__version__,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def fine_tuned(config: RunConfig, task: Task, teacher: Loaded, data: DataSplits, run: Run) -> Loaded:
    """The teacher trained on the labels, from the cache when this very training was done before.

    Raises:
        DataProblem: there are no training rows.
    """
    if data.train is None:
        raise DataProblem(
            "fine-tuning the teacher needs training rows", hint="name their split: --set data.train_split=NAME"
        )
    folder = cache_folder() / "teachers" / _fingerprint(config, teacher, data, run)
    run.provenance["teacher_fine_tuned"] = {"fingerprint": folder.name, "settings": config.teacher.model_dump()}
    with parallel.first_alone(run):
        _make(config, task, teacher, data, replace(run, world=1), folder)
    tuned = load_model(str(folder), task.auto_class, run, "teacher")
    tuned.ref, tuned.folder = f"{teacher.ref} (fine-tuned)", folder
    tuned.revision = teacher.revision
    load_processor(tuned, task, run, teacher)
    return tuned


def _make(config: RunConfig, task: Task, teacher: Loaded, data: DataSplits, run: Run, folder: Path) -> None:
    """Fill the cache folder unless it is there."""
    if not (folder / "config.json").is_file():
        assert data.train is not None
        rows = encode(
            task, DataSplits(data.train, None, data.train, data.labels, data.roles), teacher, None, config, run
        ).train
        assert rows is not None
        run.reporter.info(f"fine-tuning the teacher on {len(rows)} rows ({config.teacher.fine_tune_what})")
        if config.teacher.fine_tune_what == "head":
            fit_head(task, teacher, rows, run)
        else:
            _train(config, task, teacher, rows, run)
        _keep(teacher, folder)
    else:
        run.reporter.info("the fine-tuned teacher is taken from the cache")


def _keep(teacher: Loaded, folder: Path) -> None:
    """Save into the cache in one rename; another process may have been faster."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    save_model(teacher, partial, OutputSection(dtype="float32"))
    partial.chmod(0o755)
    for path in partial.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    try:
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)


def _train(config: RunConfig, task: Task, teacher: Loaded, rows: Examples, run: Run) -> None:
    """All weights, on hard labels, with the run's own loop."""
    settings = TrainSection(
        **config.train.model_dump(exclude={"epochs", "max_steps", "lr", "head_lr", "schedule", "checkpoint_every"}),
        epochs=config.teacher.fine_tune_epochs,
        lr=config.teacher.fine_tune_lr,
    )
    method = METHODS.get("none")(METHODS.build_config("none", {}), teacher, [], task)
    views = task.views(rows, config.augment)
    Trainer(method, rows, settings, run, is_head_of(teacher.model), views=views).train()


def fit_head(task: Task, teacher: Loaded, rows: Examples, run: Run) -> None:
    """Fit only the linear head, on features computed once, by L-BFGS.

    Minimises mean cross-entropy plus a small ridge, a convex problem, so the result does not
    depend on a learning rate.
    """
    model: Any = teacher.model.to(run.device).eval()
    labels = torch.from_numpy(np.asarray(rows.columns["labels"])).to(run.device)
    _, head = head_of(model, len(teacher.labels or []))
    features = head_inputs(task, model, head, rows, run)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    parameters = [head.weight, head.bias]
    solver = torch.optim.LBFGS(
        parameters, max_iter=200, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-7
    )

    def objective() -> torch.Tensor:
        solver.zero_grad()
        loss = functional.cross_entropy(functional.linear(features, head.weight, head.bias), labels)
        loss = loss + _RIDGE * head.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(objective)  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    teacher.facts["new_weights"] = []


@torch.no_grad()
def head_inputs(task: Task, model: nn.Module, head: nn.Module, rows: Examples, run: Run) -> torch.Tensor:
    """What reaches the head for each row, in order: [rows, width] float32."""
    caught: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: caught.append(args[0].detach().float()))
    order = ordered_batches(rows.lengths, len(rows), 64)
    try:
        for done, chosen in enumerate(order):
            task.forward(model, to_device(task.collate([rows[int(i)] for i in chosen]), run.device))
            run.reporter.progress("teacher features", done + 1, len(order), {})
    finally:
        handle.remove()
    stacked = torch.cat(caught)
    features = torch.empty_like(stacked)
    features[torch.from_numpy(np.concatenate(order)).to(stacked.device)] = stacked
    return features
