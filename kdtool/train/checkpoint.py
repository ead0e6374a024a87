"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder `step-N` with `tensors.safetensors` and `state.json`. It is written under
another name, flushed to disk, and renamed last; `state.json` carries the size and hash of the
tensor file, the names of its tensors and a hash of itself, so a damaged checkpoint is recognised
and the one before it is taken.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
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


def _digest(record: Mapping[str, Any]) -> str:
    """Hash of a record without its own hash."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write checkpoint `step`, make it durable, then remove all others but the last before it.

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
    record = {"step": step, "size": size, "sha256": file_hash(partial / "tensors.safetensors")}
    record |= {"tensors": sorted(tensors), "state": dict(state)}
    record["digest"] = _digest(record)
    (partial / "state.json").write_text(json.dumps(record), encoding="utf-8")
    for name in ("tensors.safetensors", "state.json"):
        sync(partial / name)
    sync(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    sync(folder)
    known = _steps(folder)
    kept = [number for number in known if number <= step][-_KEEP:]
    for old in known:
        if old not in kept:  # later ones were damaged, or this one would not have been written
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


def newest(
    folder: Path, warn: Callable[[str], None] = lambda _message: None
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest undamaged checkpoint, or None.

    Args:
        folder: Where checkpoints live.
        warn: Told of each damaged one that is passed over.
    """
    for step in reversed(_steps(folder)):
        path = folder / f"step-{step}"
        problem = _problem(path)
        if problem is None:
            record = json.loads((path / "state.json").read_text(encoding="utf-8"))
            return load_file(path / "tensors.safetensors"), record["state"]
        warn(f"checkpoint {path.name} is damaged ({problem}): the one before it is taken")
    return None


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    data = path / "tensors.safetensors"
    try:
        record = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if record["digest"] != _digest(record):
            return "state.json has changed"
        if data.stat().st_size != record["size"]:
            return f"{data.name} is not of its size"
        if file_hash(data) != record["sha256"]:
            return f"{data.name} has changed"
        with safe_open(data, "pt") as file:
            missing = set(record["tensors"]) - set(file.keys())
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return "state.json cannot be read"
    return f"{len(missing)} tensors are missing" if missing else None


def discard(folder: Path, after: int) -> None:
    """Remove what a kill left half-written, and checkpoints of later steps: they are damaged."""
    for path in folder.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)
    for step in _steps(folder):
        if step > after:
            shutil.rmtree(folder / f"step-{step}", ignore_errors=True)
