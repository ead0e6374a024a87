"""Weights that are read or computed one at a time, so that a model may be larger than memory.

A state maps names to `Lazy` tensors. Reading a folder opens no more than one tensor at a time; writing one
puts tensors into shards as they come. A step between the two, such as rounding, wraps `load`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdtool.errors import ModelProblem

INDEX = "model.safetensors.index.json"
_HEADER = 256 * 2**10
"""Bytes kept free for the header of a shard; it is written last, and padded with spaces as the format allows."""
_ENTRY = 400
"""Bytes that a tensor's entry in a header may need besides its name."""
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_KINDS = {name: kind for kind, name in _NAMES.items()}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True, slots=True)
class Lazy:
    """A tensor that is not there yet.

    Attributes:
        shape: Its shape.
        dtype: Its number format.
        load: Reads or computes it; what it gives may be changed in place.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize

    def then(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> "Lazy":
        """The tensor after a change that keeps its number format.

        Args:
            change: Gives the new tensor.
            shape: Its shape (default: as before).
        """
        return Lazy(self.shape if shape is None else shape, self.dtype, lambda: change(self.load()))

    def to(self, dtype: torch.dtype) -> "Lazy":
        """The tensor in another number format, if it holds floating-point numbers."""
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return Lazy(self.shape, dtype, lambda: self.load().to(dtype))


State = dict[str, Lazy]

_BLOCK = 2**22
"""Numbers that a computation by rows takes at a time."""


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Blocks of rows, so that what is computed of one needs little memory beside the matrix."""
    rows = max(1, _BLOCK // max(1, matrix[0].numel())) if matrix.ndim and len(matrix) else 1
    for start in range(0, len(matrix) if matrix.ndim else 0, rows):
        yield slice(start, start + rows)


def held(tensors: Mapping[str, Tensor]) -> State:
    """Tensors that are in memory, as a state; what it loads are copies."""
    return {
        name: Lazy(tuple(value.shape), value.dtype, value.detach().clone if not value.is_meta else value.detach)
        for name, value in tensors.items()
    }


def read(folder: Path, ref: str) -> State:
    """The weights of a folder, none of them loaded.

    Raises:
        ModelProblem: there are none in safetensors, or a file is damaged.
    """
    index = folder / INDEX
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        paths = [folder / name for name in sorted(names)]
    else:
        paths = [folder / "model.safetensors"]
    state: State = {}
    try:
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - an open file is no mapping
                    part = file.get_slice(name)
                    kind = _KINDS.get(part.get_dtype())
                    if kind is None:
                        raise ModelProblem(f"weights of '{ref}' are in a format that is not read one by one", why=name)
                    state[name] = Lazy(tuple(part.get_shape()), kind, _reader(path, name))
    except (SafetensorError, FileNotFoundError) as error:
        raise ModelProblem(
            f"weights of '{ref}' are damaged or missing", why=str(error), hint="copy or download the model again"
        ) from None
    return state


def header(folder: Path | None) -> dict[str, str]:
    """Strings in the headers of a folder's weight files, without the word that names the framework."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder else ():
        with safe_open(path, framework="pt") as file:
            found |= file.metadata() or {}
    return {key: value for key, value in found.items() if key != "format"}


def _reader(path: Path, name: str) -> Callable[[], Tensor]:
    def load() -> Tensor:
        with safe_open(path, framework="pt") as file:
            # a copy, because the file's pages go with the file
            return file.get_tensor(name).clone()  # type: ignore[no-any-return]

    return load


def size_in_bytes(text: str) -> int:
    """`5GB` or `200MiB` as a number.

    Raises:
        ModelProblem: not of that form.
    """
    word = text.strip().upper()
    unit = next((unit for unit in sorted(_UNITS, key=len, reverse=True) if word.endswith(unit)), "")
    number = word.removesuffix(unit).strip()
    if not number.replace(".", "", 1).isdigit():
        raise ModelProblem(f"'{text}' is no size of a file", hint="such as 5GB or 200MiB")
    return int(float(number) * _UNITS.get(unit, 1))


class _Shard:
    """One weight file while it is written: first the tensors, then the header in front of them."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self.path = path
        self.entries: dict[str, Any] = {"__metadata__": {**metadata, "format": "pt"}}
        self.file: BinaryIO = path.open("wb")
        self.file.seek(8 + _HEADER)
        self.size = 0
        self.header = len(json.dumps(self.entries))

    def takes(self, name: str, size: int, limit: int) -> bool:
        """Whether a tensor of that size still belongs here."""
        fits = self.size + size <= limit and self.header + len(name) + _ENTRY < _HEADER
        return fits or not self.size

    def add(self, name: str, value: Tensor) -> None:
        """Append a tensor."""
        flat = value.detach().cpu().contiguous().reshape(-1)
        self.file.write(flat.view(torch.uint8).numpy().data)
        size = flat.numel() * flat.element_size()
        kind = _NAMES[value.dtype]
        entry = {"dtype": kind, "shape": list(value.shape), "data_offsets": [self.size, self.size + size]}
        self.entries[name] = entry
        self.header += len(json.dumps({name: entry}))
        self.size += size

    def close(self) -> None:
        """Write the header."""
        text = json.dumps(self.entries).encode().ljust(_HEADER)
        self.file.seek(0)
        self.file.write(_HEADER.to_bytes(8, "little") + text)
        self.file.close()


def write(state: State, folder: Path, limit: int, metadata: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Write a state into a folder, tensor by tensor; yields each after it was written.

    Args:
        state: What to write.
        folder: A folder that holds no weights.
        limit: Largest size of a file; a tensor that alone is larger gets a file of its own.
        metadata: Strings for the headers.
    """
    shards: list[_Shard] = []
    try:
        for name, lazy in state.items():
            if not shards or not shards[-1].takes(name, lazy.bytes, limit):
                if shards:
                    shards[-1].close()
                shards.append(_Shard(folder / f"{len(shards) + 1}.part", metadata))
            value = lazy.load()
            shards[-1].add(name, value)
            yield name, value
            del value  # before the next one is loaded
    finally:
        if shards and not shards[-1].file.closed:
            shards[-1].close()
    _name(shards, folder)


def _name(shards: list[_Shard], folder: Path) -> None:
    """Give the files their names, and with several write the index."""
    if len(shards) == 1:
        shards[0].path.rename(folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard.path.rename(folder / name)
        where |= {key: name for key in shard.entries if key != "__metadata__"}
    total = sum(shard.size for shard in shards)
    values = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
