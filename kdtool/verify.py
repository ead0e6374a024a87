"""The proof: a saved model reloaded in a fresh process, and two models timed side by side.

Run as a module it is that fresh process: `python -m kdtool.verify FOLDER TASK PROBE RESULT`.
"""

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kdtool.errors import QualityProblem
from kdtool.registry import TASKS
from kdtool.tasks._base import Batch, Task, to_device

TOLERANCE = 1e-5
"""Largest allowed difference of outputs after reloading, relative to the largest output."""

_WARM_UP = 2
"""Passes before timing starts: they fill caches and allocators."""
_FEWEST = 3
"""Timed passes however long they take."""


@torch.no_grad()
def outputs(task: Task, model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits of a model in eval mode, float32 on the CPU."""
    model.eval()
    return task.forward(model, batch).logits.float().cpu()


def reload_check(folder: Path, task: Task, model: nn.Module, probe: Batch, trust_remote_code: bool) -> dict[str, Any]:
    """Load a saved model in a fresh process and compare its outputs on real inputs.

    Args:
        folder: The saved model.
        task: Its task.
        model: The model that was saved, in memory, on the CPU.
        probe: Inputs to compare on.
        trust_remote_code: Passed on to the fresh process.

    Returns:
        `max_abs_diff`, `tolerance`, `passed`, `examples`.

    Raises:
        QualityProblem: the fresh process cannot load or run the model.
    """
    expected = outputs(task, model, probe)
    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch) / "probe.safetensors", Path(scratch) / "answer.safetensors"
        save_file({key: value.contiguous() for key, value in probe.items()}, question)
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        environment["KDTOOL_VERIFY_REMOTE_CODE"] = "1" if trust_remote_code else ""
        done = subprocess.run(
            [sys.executable, "-m", "kdtool.verify", str(folder), task.name, str(question), str(answer)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not answer.is_file():
            last = (done.stderr.strip() or "no message").rsplit("\n", 1)[-1]
            raise QualityProblem("the saved model does not load in a fresh process", why=last[:300])
        found = load_file(answer)["logits"]
    difference = float((found - expected).abs().max())
    bound = TOLERANCE * max(1.0, float(expected.abs().max()))
    rows = next(iter(probe.values())).shape[0]
    return {"max_abs_diff": difference, "tolerance": bound, "passed": difference <= bound, "examples": rows}


def latency(
    task: Task,
    models: Mapping[str, nn.Module],
    views: Mapping[str, Mapping[int, Batch]],
    repeats: int,
    device: str,
    patience: float = math.inf,
) -> dict[str, dict[int, dict[str, float]]]:
    """Time forward passes of several models in turn, so that they meet the same machine.

    Args:
        task: Runs the models.
        models: Name to model.
        views: Name to batch size (or another measure of the inputs) to inputs.
        repeats: Timed passes for each model and batch.
        device: Where to run.
        patience: Seconds after which no further turn begins, once there are three.

    Returns:
        Model name to batch size to `median_ms` and `p95_ms` of one forward pass.
    """
    result: dict[str, dict[int, dict[str, float]]] = {name: {} for name in models}
    for size in next(iter(views.values())):
        inputs = {name: to_device(views[name][size], device) for name in models}
        times: dict[str, list[float]] = {name: [] for name in models}
        began = time.perf_counter()
        for turn in range(repeats + _WARM_UP):
            if turn >= _WARM_UP + _FEWEST and time.perf_counter() - began > patience:
                break
            for name, model in models.items():
                elapsed = _timed(task, model, inputs[name], device)
                if turn >= _WARM_UP:
                    times[name].append(elapsed)
        for name, values in times.items():
            result[name][size] = {
                "median_ms": float(np.median(values)),
                "p95_ms": float(np.percentile(values, 95)),
            }
    return result


@torch.inference_mode()
def _timed(task: Task, model: nn.Module, inputs: Batch, device: str) -> float:
    model.eval()
    start = time.perf_counter()
    task.forward(model, inputs)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def _answer(folder: str, task_name: str, question: str, answer: str) -> None:
    """The fresh process: load, run, write the logits."""
    from kdtool.models import load
    from kdtool.run import Run

    task: Task = TASKS.get(task_name)()
    run = Run(offline=True, trust_remote_code=bool(os.environ.get("KDTOOL_VERIFY_REMOTE_CODE")))
    model = load(folder, task_name, run).float()
    save_file({"logits": outputs(task, model, load_file(question)).contiguous()}, answer)


if __name__ == "__main__":
    _answer(*sys.argv[1:5])
