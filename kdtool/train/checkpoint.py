"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder `step-N` with `tensors.safetensors` and `state.json`. It is written under
another name, flushed to disk, and renamed last; `state.json` carries the size and hash of the
tensor file, so a damaged checkpoint is recognised and the one before it is taken.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

_KEEP = 2


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write checkpoint `step`, make it durable, then remove older ones but the last before it.

    Args:
        folder: Where checkpoints live.
        step: Optimiser steps done.
        tensors: Everything that is a tensor; copies are made of shared or strided ones.
        state: Everything else, as JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, partial = folder / f"step-{step}", folder / f".step-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file(_separate(tensors), partial / "tensors.safetensors")
    size = (partial / "tensors.safetensors").stat().st_size
    record = {"step": step, "size": size, "sha256": file_hash(partial / "tensors.safetensors"), "state": dict(state)}
    (partial / "state.json").write_text(json.dumps(record), encoding="utf-8")
    for name in ("tensors.safetensors", "state.json"):
        sync(partial / name)
    sync(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    sync(folder)
    for old in _steps(folder)[:-_KEEP]:
        shutil.rmtree(folder / f"step-{old}", ignore_errors=True)
    return target


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as the file format wants them."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        if place in seen or value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()
        seen.add(place)
        result[name] = value
    return result


def _steps(folder: Path) -> list[int]:
    found = []
    for path in folder.glob("step-*"):
        with contextlib.suppress(ValueError):
            found.append(int(path.name.removeprefix("step-")))
    return sorted(found)


def newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest undamaged checkpoint, or None."""
    for step in reversed(_steps(folder)):
        path = folder / f"step-{step}"
        try:
            record = json.loads((path / "state.json").read_text(encoding="utf-8"))
            data = path / "tensors.safetensors"
            if data.stat().st_size == record["size"] and file_hash(data) == record["sha256"]:
                return load_file(data), record["state"]
        except (OSError, ValueError, KeyError):
            continue
    return None
