"""What a frozen teacher says about each training row, computed once and kept.

The rows are cut into fixed chunks of similar length. The first row of a chunk that is asked for
has the whole chunk computed, so what the cache holds does not depend on seed, order, batch size or
on whether it was filled before: cold, warm and resumed runs see the same numbers.

On disk a cache is a folder with `cache.json` (the fingerprint, part by part) and
`teacher.safetensors`, an ordinary file of that format that is mapped into memory and filled in
place: tensor `logits` [rows, ...] float32 and `filled` [chunks] uint8, each chunk marked after it
is written.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdtool.data.batching import ordered_batches
from kdtool.data.examples import Examples
from kdtool.errors import ConfigProblem, OutputProblem, UsageProblem
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.tasks._base import LABELS, Task, to_device, view_of
from kdtool.writing import write_text

_CHUNK = 32
_FILE = "teacher.safetensors"


def data_hash(data: Examples) -> str:
    """Hash of the encoded inputs of all rows; labels are left out, teachers do not see them."""
    digest = hashlib.sha256()
    for name in sorted(data.columns):
        if name == LABELS:
            continue
        digest.update(name.encode())
        column = data.columns[name]
        if isinstance(column, np.ndarray):
            digest.update(str(column.shape).encode() + np.ascontiguousarray(column).tobytes())
        else:
            for row in column:
                value = np.ascontiguousarray(row)
                digest.update(str(value.shape).encode() + value.tobytes())
    return digest.hexdigest()


def fingerprint(teacher: Loaded, data: Examples, run: Run, processor: str) -> dict[str, str]:
    """Everything that shapes what a teacher says, part by part.

    Args:
        teacher: The teacher; its weights are hashed as they are in memory.
        data: Encoded training rows.
        run: Gives device and number format.
        processor: Description of what makes the teacher's inputs.
    """
    digest = hashlib.sha256()
    for name, tensor in teacher.model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {
        "teacher": digest.hexdigest(),
        "architecture": hashlib.sha256(
            json.dumps(teacher.model.config.to_diff_dict(), default=str).encode()
        ).hexdigest(),
        "data": data_hash(data),
        "processor": hashlib.sha256(processor.encode()).hexdigest(),
        "precision": run.dtype or "float32",
        "device": run.device.split(":")[0],
        "torch": torch.__version__.split("+")[0],
        "chunk": str(_CHUNK),
    }


class TeacherCache:
    """Logits of one teacher on all training rows.

    Args:
        folder: Where the cache lives or will live.
        task: Runs the teacher.
        teacher: The teacher, on the run's device.
        data: Encoded training rows.
        run: Context.
        index: Number of the teacher among the method's teachers.
        marks: Its fingerprint.
        limit: Largest size in bytes.

    Raises:
        ConfigProblem: the folder holds the cache of something else.
        UsageProblem: the cache would be larger than `limit`.
    """

    def __init__(
        self,
        folder: Path,
        task: Task,
        teacher: Loaded,
        data: Examples,
        run: Run,
        index: int,
        marks: Mapping[str, str],
        limit: int,
    ) -> None:
        self.task, self.teacher, self.data, self.run, self.index = task, teacher, data, run, index
        self.chunks = ordered_batches(data.lengths, len(data), _CHUNK)
        self.chunk_of = np.empty(len(data), dtype=np.int64)
        for number, rows in enumerate(self.chunks):
            self.chunk_of[rows] = number
        shape = self._row_shape()
        size = 4 * len(data) * math.prod(shape)
        if size > limit:
            raise UsageProblem(
                f"the teacher cache would take {size / 2**20:,.0f} MiB, more than the {limit / 2**20:,.0f} MiB allowed",
                hint="--set train.teacher_cache_limit=MIB allows more, --no-teacher-cache does without",
            )
        known = folder / "cache.json"
        if known.is_file():
            self._refuse_other(known, marks)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            _create(folder / _FILE, {"logits": ("F32", (len(data), *shape)), "filled": ("U8", (len(self.chunks),))})
            write_text(known, json.dumps({"rows": len(data), **marks}, indent=2) + "\n")
        mapped = _map(folder / _FILE)
        self.logits, self.filled = mapped["logits"], mapped["filled"]

    def _refuse_other(self, known: Path, marks: Mapping[str, str]) -> None:
        try:
            found = json.loads(known.read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        differing = [name for name, value in marks.items() if found.get(name) != value]
        if differing:
            raise ConfigProblem(
                f"the teacher cache {known.parent} was made for another run",
                why=f"different {', '.join(differing)}",
                hint="name another folder with --teacher-cache, or delete this one",
            )

    def _row_shape(self) -> tuple[int, ...]:
        """Shape of one row's logits, from a forward pass on one row."""
        logits = self._run_teacher(self.chunks[-1][:1])
        return tuple(logits.shape[1:])

    @torch.no_grad()
    def _run_teacher(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """Logits of some rows: [rows, classes], or [rows, tokens, vocabulary]."""
        batch = to_device(self.task.collate([self.data[int(i)] for i in rows]), self.run.device)
        with torch.autocast(self.run.device.split(":")[0], _dtype(self.run), enabled=self.run.dtype is not None):
            out = self.task.forward(self.teacher.model, view_of(batch, self.index))
        logits = out.logits.float().cpu()
        return logits.reshape(len(rows), -1, logits.shape[-1]) if len(logits) != len(rows) else logits

    def get(self, rows: Tensor) -> Tensor:
        """Logits [units, classes] float32 of rows [batch], computing what is missing.

        For language models the units are the predicted tokens of the rows, in order.
        """
        numbers = rows.cpu().numpy()
        for chunk in np.unique(self.chunk_of[numbers]):
            if not self.filled[chunk]:
                members = self.chunks[chunk]
                self.logits[members] = self._run_teacher(members).numpy()
                self.filled[chunk] = 1
        taken = torch.from_numpy(self.logits[numbers])
        return taken.reshape(-1, taken.shape[-1]).to(self.run.device)

    @property
    def share(self) -> float:
        """Share of the rows that are filled."""
        return float(np.mean(self.filled))


def _dtype(run: Run) -> torch.dtype:
    return torch.float16 if run.dtype == "float16" else torch.bfloat16


def _create(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file of zeros, sparse on disk until it is filled."""
    sizes = {"F32": 4, "U8": 1}
    header: dict[str, Any] = {}
    position = 0
    for name, (kind, shape) in tensors.items():
        end = position + sizes[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + position)
        partial.replace(path)
    except OSError as error:
        raise OutputProblem(f"the teacher cache {path.parent} cannot be written", why=error.strerror) from None


def _map(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, mapped for reading and writing."""
    kinds = {"F32": np.float32, "U8": np.uint8}
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {
        name: np.memmap(
            path,
            dtype=kinds[entry["dtype"]],
            mode="r+",
            offset=8 + length + entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }
