"""What a frozen teacher says about each training row, computed once and kept.

The rows are cut into fixed chunks of similar length. The first row of a chunk that is asked for
has the whole chunk computed, so what the cache holds does not depend on seed, order, batch size or
on whether it was filled before: cold, warm and resumed runs see the same numbers.

On disk a cache is a folder with `cache.json` (the fingerprint, part by part) and
`teacher.safetensors`, an ordinary file of that format that is mapped into memory and filled in
place: tensor `logits` [rows, ...] float32 and `sums` [chunks] int32, the checksum of each chunk,
written after it; 0 where there is none yet. Each process checks a chunk the first time it reads
it, so a chunk that a kill or a power cut left half-written is computed again.
"""

import errno
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kdtool.config import AugmentSection
from kdtool.data.batching import ordered_batches
from kdtool.data.examples import Examples
from kdtool.errors import ConfigProblem, OutputProblem, UsageProblem
from kdtool.models import Loaded, weights_hash
from kdtool.run import Run
from kdtool.tasks._base import LABELS, Task, view_of
from kdtool.tasks._views import Views, collated
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


def fingerprint(
    teacher: Loaded, data: Examples, run: Run, processor: str, augment: AugmentSection | None = None
) -> dict[str, str]:
    """Everything that shapes what a teacher says, part by part.

    Args:
        teacher: The teacher; its weights are hashed as they are in memory.
        data: Encoded training rows.
        run: Gives device and number format.
        processor: Description of what makes the teacher's inputs.
        augment: How rows are altered; None, or nothing in it, where they are not.
    """
    config: Any = teacher.model.config
    views = {"views": augment.model_dump_json()} if augment is not None and augment.active else {}
    return views | {
        "teacher": weights_hash(teacher.model),
        "architecture": hashlib.sha256(json.dumps(config.to_diff_dict(), default=str).encode()).hexdigest(),
        "data": data_hash(data),
        "processor": hashlib.sha256(processor.encode()).hexdigest(),
        "precision": run.dtype or "float32",
        "device": run.device.split(":")[0],
        "torch": torch.__version__.split("+")[0],
        "chunk": str(_CHUNK),
        "layout": "2",
    }


def different_marks(folder: Path, marks: Mapping[str, str]) -> list[str]:
    """Parts of a fingerprint in which the cache of a folder differs."""
    try:
        found = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
    except ValueError:
        found = {}
    return [name for name, value in marks.items() if found.get(name) != value]


def is_of_another_run(folder: Path, marks: Mapping[str, str]) -> bool:
    """Whether a folder holds the cache of something else."""
    return (folder / "cache.json").is_file() and bool(different_marks(folder, marks))


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
        views: Makes the altered rows of which it holds what the teacher says, `views.count` for each row;
            None for the rows as they are.

    Raises:
        ConfigProblem: the folder holds the cache of something else.
        UsageProblem: the cache would be larger than `limit`.
        OutputProblem: there is none, and none can be made there.
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
        views: Views | None = None,
    ) -> None:
        self.views = views
        self.size = len(data) * (views.count if views else 1)
        self.task, self.teacher, self.data, self.run, self.index = task, teacher, data, run, index
        self.chunks = ordered_batches(None if views else data.lengths, self.size, _CHUNK)
        self.chunk_of = np.empty(self.size, dtype=np.int64)
        for number, rows in enumerate(self.chunks):
            self.chunk_of[rows] = number
        shape = self._row_shape()
        size = self.size * _row_bytes(shape)
        if size > limit:
            raise UsageProblem(
                f"the teacher cache would take {size / 2**20:,.0f} MiB, more than the {limit / 2**20:,.0f} MiB allowed",
                hint="--set train.teacher_cache_limit=MIB allows more, --no-teacher-cache does without",
            )
        self._open(folder, marks, {"logits": ("F32", (self.size, *shape)), "sums": ("I32", (len(self.chunks),))})
        # chunks that this process has checked or computed, and whether these are all
        self.known, self.complete = np.zeros(len(self.chunks), dtype=bool), False

    def _open(self, folder: Path, marks: Mapping[str, str], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """Map the cache of the folder, made anew where there is none or its file is cut short."""
        known = folder / "cache.json"
        if known.is_file():
            differing = different_marks(folder, marks)
            if differing:
                raise ConfigProblem(
                    f"the teacher cache {folder} was made for another run",
                    why=f"different {', '.join(differing)}",
                    hint="name another folder with --teacher-cache, or delete this one",
                )
        if not known.is_file() or not _is_whole(folder / _FILE, tensors):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _create(folder / _FILE, tensors)
                write_text(known, json.dumps({"rows": self.size, **marks}, indent=2) + "\n")
            except (OSError, OutputProblem) as error:
                why = error.strerror if isinstance(error, OSError) else error.why
                raise OutputProblem(
                    f"the teacher cache {folder} cannot be written",
                    why=why,
                    hint="name another folder with --teacher-cache, or do without: --no-teacher-cache",
                ) from None
        try:
            mapped = _map(folder / _FILE, "r+")
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            mapped = _map(folder / _FILE, "c")
            self.run.reporter.info(f"the teacher cache {folder} is read-only: what it lacks is computed and not kept")
        self.logits, self.sums = mapped["logits"], mapped["sums"]

    def _row_shape(self) -> tuple[int, ...]:
        """Shape of one row's logits, from a forward pass on one row."""
        logits = self._run_teacher(self.chunks[-1][:1])
        return tuple(logits.shape[1:])

    @torch.no_grad()
    def _run_teacher(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """Logits of some rows: [rows, classes], or [rows, tokens, vocabulary]."""
        if self.views is None:
            batch = collated(self.task, self.data, rows, self.run.device)
        else:
            batch = self.views.batch(np.asarray(rows), self.run.device)
        with torch.autocast(self.run.device.split(":")[0], _dtype(self.run), enabled=self.run.dtype is not None):
            out = self.task.forward(self.teacher.model, view_of(batch, self.index))
        logits = out.logits.float().cpu()
        return logits.reshape(len(rows), -1, logits.shape[-1]) if len(logits) != len(rows) else logits

    def get(self, rows: Tensor) -> Tensor:
        """Logits [units, classes] float32 of rows [batch], computing what is missing.

        For language models the units are the predicted tokens of the rows, in order.
        """
        numbers = rows.cpu().numpy()
        if not self.complete:
            wanted = self.chunk_of[numbers]
            for chunk in np.unique(wanted[~self.known[wanted]]):
                self._provide(chunk)
            self.complete = bool(self.known.all())
        taken = torch.from_numpy(self.logits[numbers])
        return taken.reshape(-1, taken.shape[-1]).to(self.run.device)

    def _provide(self, chunk: int) -> None:
        """Check a chunk, and compute it where it is missing or damaged."""
        members = self.chunks[chunk]
        if not self._is_sound(chunk):
            logits = self._run_teacher(members).numpy()
            self.logits[members] = logits
            self.sums[chunk] = _checksum(logits)
        self.known[chunk] = True

    def _is_sound(self, chunk: int) -> bool:
        return bool(self.sums[chunk]) and _checksum(self.logits[self.chunks[chunk]]) == self.sums[chunk]

    @property
    def share(self) -> float:
        """Share of the chunks that are filled."""
        return float(np.mean(self.sums != 0))


def _dtype(run: Run) -> torch.dtype:
    return torch.float16 if run.dtype == "float16" else torch.bfloat16


def _row_bytes(shape: Sequence[int]) -> int:
    """Bytes of one row's logits in float32."""
    return 4 * math.prod(shape)


def _checksum(logits: np.ndarray) -> np.int32:
    """Checksum of a chunk's values, never 0."""
    return np.uint32(zlib.crc32(np.ascontiguousarray(logits).tobytes()) or 1).view(np.int32)


def _layout(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, int]:
    """Header of a safetensors file, and the size of the file in bytes."""
    header: dict[str, Any] = {}
    position = 0
    for name, (kind, shape) in tensors.items():
        end = position + 4 * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + position


def _is_whole(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bool:
    """Whether a file has just this header and size."""
    header, size = _layout(tensors)
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as stream:
        return stream.read(len(header)) == header


def _create(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file of zeros, sparse on disk until it is filled."""
    header, size = _layout(tensors)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as stream:
        stream.write(header)
        stream.truncate(size)
    partial.replace(path)


def _map(path: Path, mode: Literal["c", "r+"]) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, mapped; with `c` what is written stays in this process."""
    kinds = {"F32": np.float32, "I32": np.int32}
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {
        name: np.memmap(
            path,
            dtype=kinds[entry["dtype"]],
            mode=mode,
            offset=8 + length + entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
        )
        for name, entry in header.items()
    }
