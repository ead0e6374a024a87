"""Tensors in ordinary safetensors files that are mapped into memory and filled in place."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

_KINDS: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "I32": np.dtype(np.int32),
}

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name of a tensor to its number format (F32, F16 or I32) and shape."""


def layout(tensors: Shapes, facts: Mapping[str, str] | None = None) -> tuple[bytes, int]:
    """Header of a file, and the size of the file in bytes.

    Args:
        tensors: What the file holds.
        facts: What it says of itself.
    """
    header: dict[str, Any] = {"__metadata__": dict(facts)} if facts else {}
    position = 0
    # wide numbers first, so that every tensor starts at a multiple of its format
    for name, (kind, shape) in sorted(tensors.items(), key=lambda item: -_KINDS[item[1][0]].itemsize):
        end = position + _KINDS[kind].itemsize * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + position


def is_whole(path: Path, tensors: Shapes, facts: Mapping[str, str] | None = None) -> bool:
    """Whether a file has just this header and size."""
    header, size = layout(tensors, facts)
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as stream:
        return stream.read(len(header)) == header


def create(path: Path, tensors: Shapes, facts: Mapping[str, str] | None = None) -> None:
    """A file of zeros, sparse on disk until it is filled."""
    header, size = layout(tensors, facts)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as stream:
        stream.write(header)
        stream.truncate(size)
    partial.replace(path)


def mapped(path: Path, mode: Literal["c", "r+"]) -> dict[str, np.ndarray]:
    """The tensors of a file, mapped; with `c` what is written stays in this process."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {
        name: np.memmap(
            path,
            dtype=_KINDS[entry["dtype"]],
            mode=mode,
            offset=8 + length + entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


class Shards:
    """Tensors whose first dimension is spread over several files.

    Args:
        parts: Mapped tensors of each file, all of the same names.
        starts: First entry of each file.
    """

    def __init__(self, parts: Sequence[Mapping[str, np.ndarray]], starts: Sequence[int]) -> None:
        self.parts, self.starts = list(parts), np.asarray(starts)

    def read(self, name: str, entries: np.ndarray) -> np.ndarray:
        """Copies of the entries [n] of a tensor."""
        first = self.parts[0][name]
        if len(self.parts) == 1:
            return np.asarray(first[entries])
        found = np.empty((len(entries), *first.shape[1:]), first.dtype)
        for part, chosen, there in self._by_part(entries):
            found[chosen] = part[name][there]
        return found

    def write(self, name: str, entries: np.ndarray, values: np.ndarray) -> None:
        """Put values in the place of entries."""
        for part, chosen, there in self._by_part(entries):
            part[name][there] = values[chosen]

    def _by_part(self, entries: np.ndarray) -> list[tuple[Mapping[str, np.ndarray], np.ndarray, np.ndarray]]:
        """Each file that holds some of the entries, which of them, and their places in it."""
        owners = np.searchsorted(self.starts, entries, side="right") - 1
        found = []
        for owner in np.unique(owners):
            chosen = np.flatnonzero(owners == owner)
            found.append((self.parts[owner], chosen, entries[chosen] - self.starts[owner]))
        return found
