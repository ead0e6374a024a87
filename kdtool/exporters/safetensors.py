"""Safetensors: weights, configuration and processor as transformers loads them.

Shards by `output.max_shard_size`, converts to `output.dtype`, stores tied weights once, and keeps
every string of the source's own safetensors header. The result is reloaded in a fresh process and
compared with the source.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kdtool.exporters._base import ExportReport
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.saving import save_model, stored_dtype
from kdtool.sections import RunConfig
from kdtool.tasks._base import Batch, Task
from kdtool.verify import outputs, reload_check

_LOSS = {"float32": 0.0, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest change of outputs that rounding weights may cause, relative to the largest output."""


def export(
    loaded: Loaded, task: Task, probes: Sequence[Batch], folder: Path, config: RunConfig, run: Run
) -> ExportReport:
    """Write a model and prove that it loads and computes the same.

    Args:
        loaded: Model and processor, in float32 on the CPU.
        task: Its task.
        probes: Batches to compare on; the first is used.
        folder: An empty folder.
        config: Gives dtype and shard size.
        run: Context.
    """
    probe = probes[0]
    before = outputs(task, loaded.model, probe)
    dtype = stored_dtype(loaded, config.output.dtype)
    rounded = dtype != stored_dtype(loaded, "keep")
    header = _metadata(loaded.folder)
    save_model(loaded, folder, config.output)
    _add_metadata(folder, header)
    after = outputs(task, loaded.model, probe)
    reload = reload_check(folder, task, loaded.model, probe, run.trust_remote_code)
    change = float((after - before).abs().max())
    bound = (_LOSS[dtype] if rounded else 0.0) * max(1.0, float(before.abs().max()))
    parity: dict[str, Any] = {
        "max_abs_diff": max(change, reload["max_abs_diff"]),
        "from_rounding": change,
        "from_reload": reload["max_abs_diff"],
        "tolerance": bound + reload["tolerance"],
        "passed": change <= bound and reload["passed"],
        "examples": reload["examples"],
    }
    names = sorted(path.name for path in folder.glob("*.safetensors*"))
    return ExportReport(dtype, names, parity)


def _metadata(folder: Path | None) -> dict[str, str]:
    """Strings in the header of the source's weight files."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder else ():
        with safe_open(path, framework="pt") as file:
            found |= file.metadata() or {}
    return found


def _add_metadata(folder: Path, header: dict[str, str]) -> None:
    """Write the source's header strings into the new files, shard by shard."""
    extra = {key: value for key, value in header.items() if key != "format"}
    if not extra:
        return
    for path in folder.glob("*.safetensors"):
        tensors: dict[str, torch.Tensor] = {name: tensor.clone() for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={**extra, "format": "pt"})
