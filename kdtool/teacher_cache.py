"""What a frozen teacher says about each training row, computed once and kept.

The rows are cut into fixed chunks of similar length. The first row of a chunk that is asked for
has the whole chunk computed, so what the cache holds does not depend on seed, order, batch size or
on whether it was filled before: cold, warm and resumed runs see the same numbers.

On disk a cache is a folder with `cache.json` (the fingerprint, part by part) and
`teacher.safetensors`, an ordinary file of that format that is mapped into memory and filled in
place: tensor `logits` [units, classes] float32 and `sums` [chunks] int32, the checksum of each
chunk, written after it; 0 where there is none yet. Each process checks a chunk the first time it
reads it, so a chunk that a kill or a power cut left half-written is computed again.

Of language models it may hold the likeliest tokens alone: `values` [units, k] float16, their
log-probabilities, `ids` [units, k] int32, and `rest` [units] float32, the log of the mass of all
other tokens; in several files where it is large. Such a cache can stand for its teacher.
"""

import errno
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kdtool.data.batching import ordered_batches
from kdtool.data.examples import Examples
from kdtool.divergences import TopK, likeliest
from kdtool.errors import ConfigProblem, OutputProblem, UsageProblem
from kdtool.mapped import Shapes, Shards, create, is_whole, mapped
from kdtool.models import Loaded, weights_hash
from kdtool.run import Run
from kdtool.sections import AugmentSection
from kdtool.tasks._base import LABELS, Batch, Task, view_of
from kdtool.tasks._views import Views, collated
from kdtool.writing import write_text

CHUNK = 32
"""Rows that are computed at once."""
_SHARD = 2**30
"""Bytes of a file of the likeliest tokens; whole logits are bounded by `train.teacher_cache_limit`."""
_UNSEEN = (LABELS, "position_ids", "reference")
"""Columns that teachers do not see, or that follow from others."""
_MARKS = "cache.json"


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of a language model.

    Attributes:
        k: Number of the likeliest tokens.
        temperature: Divides the logits before softmax.
    """

    k: int
    temperature: float


def data_hash(data: Examples) -> str:
    """Hash of the encoded inputs of all rows; labels are left out, teachers do not see them."""
    digest = hashlib.sha256()
    for name in sorted(data.columns):
        if name in _UNSEEN:
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


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of a tokenizer's tokens and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def fingerprint(
    teacher: Loaded,
    data: Examples,
    run: Run,
    processor: str,
    augment: AugmentSection | None = None,
    kept: Kept | None = None,
) -> dict[str, str]:
    """Everything that shapes what a teacher says, part by part.

    Args:
        teacher: The teacher; its weights are hashed as they are in memory.
        data: Encoded training rows.
        run: Gives device and number format.
        processor: Description of what makes the teacher's inputs.
        augment: How rows are altered; None, or nothing in it, where they are not.
        kept: What is kept of a language model; None for all logits.
    """
    config: Any = teacher.model.config
    views = {"views": augment.model_dump_json()} if augment is not None and augment.active else {}
    about = {} if kept is None else described(teacher.ref, teacher.revision, teacher.processor, kept)
    return (
        views
        | about
        | {
            "teacher": weights_hash(teacher.model),
            "architecture": hashlib.sha256(json.dumps(config.to_diff_dict(), default=str).encode()).hexdigest(),
            "data": data_hash(data),
            "processor": hashlib.sha256(processor.encode()).hexdigest(),
            "precision": run.dtype or "float32",
            "device": run.device.split(":")[0],
            "torch": torch.__version__.split("+")[0],
        }
        | _form()
    )


def served_fingerprint(model: str, address: str, tokenizer: Any, data: Examples, kept: Kept) -> dict[str, str]:
    """What is known of a teacher behind an endpoint, and of what it is asked; a server does not say its weights.

    Args:
        model: Name by which the server knows it.
        address: Of the server.
        tokenizer: Of the rows.
        data: Encoded training rows.
        kept: What is kept.
    """
    return described(model, None, tokenizer, kept) | {"endpoint": address, "data": data_hash(data)} | _form()


def _form() -> dict[str, str]:
    """How the cache is laid out."""
    return {"chunk": str(CHUNK), "layout": "3"}


def described(model: str, revision: str | None, tokenizer: Any, kept: Kept) -> dict[str, str]:
    """What a cache that can stand for its teacher says of it."""
    return {
        "model": model,
        "revision": revision or "",
        "tokenizer": tokenizer_hash(tokenizer),
        "vocabulary": str(len(tokenizer)),
        "k": str(min(kept.k, len(tokenizer))),
        "temperature": repr(kept.temperature),
        "formats": "values float16, ids int32, rest float32",
    }


def read_marks(folder: Path) -> dict[str, str]:
    """What a cache that stands for its teacher says of itself.

    Raises:
        UsageProblem: there is none, or it holds whole logits.
    """
    try:
        found = json.loads((folder / _MARKS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageProblem(f"there is no teacher cache in {folder}", hint=_FILL) from None
    if not isinstance(found, dict) or "k" not in found:
        raise UsageProblem(
            f"the teacher cache {folder} cannot stand for its teacher", why="it holds whole logits", hint=_FILL
        )
    return {str(key): str(value) for key, value in found.items()}


_FILL = "kdtool distill TEACHER ... --teacher-cache FOLDER --set train.teacher_cache_top_k=64 fills one in an epoch"


def different_marks(folder: Path, marks: Mapping[str, str]) -> list[str]:
    """Parts of a fingerprint in which the cache of a folder differs."""
    try:
        found = json.loads((folder / _MARKS).read_text(encoding="utf-8"))
    except ValueError:
        found = {}
    return [name for name, value in marks.items() if found.get(name) != value]


def is_of_another_run(folder: Path, marks: Mapping[str, str]) -> bool:
    """Whether a folder holds the cache of something else."""
    return (folder / _MARKS).is_file() and bool(different_marks(folder, marks))


class TeacherCache:
    """What one teacher says of all training rows.

    Args:
        folder: Where the cache lives or will live.
        task: Runs the teacher.
        teacher: The teacher, on the run's device; None where the cache stands for it, or is told.
        data: Encoded training rows.
        run: Context.
        index: Number of the teacher among the method's teachers.
        marks: Its fingerprint.
        limit: Largest size in bytes.
        views: Makes the altered rows of which it holds what the teacher says, `views.count` for each row;
            None for the rows as they are.
        kept: What is kept of a language model; None for all logits.
        told: Whether `put` fills it, in place of a teacher.

    Raises:
        ConfigProblem: the folder holds the cache of something else, or of not all rows without a teacher.
        UsageProblem: the cache would be larger than `limit`.
        OutputProblem: there is none, and none can be made there.
    """

    def __init__(
        self,
        folder: Path,
        task: Task,
        teacher: Loaded | None,
        data: Examples,
        run: Run,
        index: int,
        marks: Mapping[str, str],
        limit: int,
        views: Views | None = None,
        kept: Kept | None = None,
        told: bool = False,
    ) -> None:
        self.views, self.kept, self.folder = views, kept, folder
        self.closed = teacher is None and not told
        self.size = len(data) * (views.count if views else 1)
        self.task, self.teacher, self.data, self.run, self.index = task, teacher, data, run, index
        self.chunks = ordered_batches(None if views else data.lengths, self.size, CHUNK)
        self.chunk_of = np.empty(self.size, dtype=np.int64)
        for number, rows in enumerate(self.chunks):
            self.chunk_of[rows] = number
        # units of row i are those from ends[i] to ends[i + 1]
        self.ends = np.concatenate([[0], np.cumsum(self._units())])
        self.vocabulary = None if teacher is None or kept is None else len(teacher.processor)
        width = int(marks["k"]) if kept else self._classes()
        size = int(self.ends[-1]) * _unit_bytes(width, kept)
        if size > limit:
            raise UsageProblem(
                f"the teacher cache would take {size / 2**20:,.0f} MiB, more than the {limit / 2**20:,.0f} MiB allowed",
                hint="--set train.teacher_cache_limit=MIB allows more, --no-teacher-cache does without",
            )
        self._open(marks, width, max(1, math.ceil(size / _SHARD)) if kept else 1)
        # chunks that this process has checked or computed, and whether these are all
        self.known, self.complete = np.zeros(len(self.chunks), dtype=bool), False
        if self.closed and self.share < 1:
            raise ConfigProblem(
                f"the teacher cache {folder} holds {self.share:.0%} of the rows, and there is no teacher to ask",
                hint=_FILL,
            )

    def _units(self) -> np.ndarray:
        """Number of units of each row."""
        if self.task.classifies:
            return np.ones(self.size, dtype=np.int64)
        found = np.empty(self.size, dtype=np.int64)
        for rows in self.chunks:
            found[rows] = self.task.units(self._batch(rows, "cpu")).numpy()
        return found

    def _files(self, width: int, count: int) -> list[tuple[Path, int, Shapes]]:
        """Each file, its first unit, and what it holds; rows are not spread over files."""
        total = int(self.ends[-1])
        cuts = [int(self.ends[np.searchsorted(self.ends, total * i / count)]) for i in range(count)]
        found: list[tuple[Path, int, Shapes]] = []
        for number, (begin, end) in enumerate(zip(cuts, [*cuts[1:], total], strict=True), 1):
            name = "teacher" if count == 1 else f"teacher-{number:05d}-of-{count:05d}"
            units = end - begin
            shapes: dict[str, tuple[str, tuple[int, ...]]]
            if self.kept:
                shapes = {"values": ("F16", (units, width)), "ids": ("I32", (units, width)), "rest": ("F32", (units,))}
            else:
                shapes = {"logits": ("F32", (units, width))}
            if number == 1:
                shapes["sums"] = ("I32", (len(self.chunks),))
            found.append((self.folder / f"{name}.safetensors", begin, shapes))
        return found

    def _open(self, marks: Mapping[str, str], width: int, count: int) -> None:
        """Map the cache of the folder, made anew where there is none or a file is cut short."""
        folder, known, files = self.folder, self.folder / _MARKS, self._files(width, count)
        if known.is_file():
            differing = different_marks(folder, marks)
            if differing:
                raise ConfigProblem(
                    f"the teacher cache {folder} was made for another run",
                    why=f"different {', '.join(differing)}",
                    hint="name another folder with --teacher-cache, or delete this one",
                )
        facts = dict(marks) if self.kept else None
        if not known.is_file() or not all(is_whole(path, shapes, facts) for path, _, shapes in files):
            if self.closed:
                raise ConfigProblem(f"the teacher cache {folder} is damaged", why="a file is missing or cut short")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for path, _, shapes in files:
                    create(path, shapes, facts)
                write_text(known, json.dumps({"rows": self.size, **marks}, indent=2) + "\n")
            except (OSError, OutputProblem) as error:
                why = error.strerror if isinstance(error, OSError) else error.why
                raise OutputProblem(
                    f"the teacher cache {folder} cannot be written",
                    why=why,
                    hint="name another folder with --teacher-cache, or do without: --no-teacher-cache",
                ) from None
        parts = self._mapped([path for path, _, _ in files])
        self.sums = parts[0].pop("sums")
        self.held = Shards(parts, [begin for _, begin, _ in files])

    def _mapped(self, paths: Sequence[Path]) -> list[dict[str, np.ndarray]]:
        """The files' tensors; where they cannot be written, what is written stays in this process."""
        mode: Literal["c", "r+"] = "c" if self.closed else "r+"
        try:
            return [mapped(path, mode) for path in paths]
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
        self.run.reporter.info(f"the teacher cache {self.folder} is read-only: what it lacks is computed and not kept")
        return [mapped(path, "c") for path in paths]

    def _classes(self) -> int:
        """Number of a unit's logits, from a forward pass on one row."""
        return int(self._run_teacher(self.chunks[-1][:1])["logits"].shape[1])

    def _batch(self, rows: Sequence[int] | np.ndarray, device: str) -> Batch:
        if self.views is None:
            return collated(self.task, self.data, rows, device)
        return self.views.batch(np.asarray(rows), device)

    @torch.no_grad()
    def _run_teacher(self, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """What is held of some rows, by the names of the tensors, their units in order."""
        assert self.teacher is not None
        batch = view_of(self._batch(rows, self.run.device), self.index)
        with torch.autocast(self.run.device.split(":")[0], _dtype(self.run), enabled=self.run.dtype is not None):
            if self.kept is None:
                return {"logits": self.task.forward(self.teacher.model, batch).logits.float().cpu().numpy()}
            found = self.task.states(self.teacher.model, batch)
            head = found.head.cut(self.vocabulary or 0)
            best = likeliest(found.hidden, head, self.kept.k, self.kept.temperature)
        held = {"values": best.log_probs.half(), "ids": best.ids.int(), "rest": best.rest.float()}
        return {name: value.cpu().numpy() for name, value in held.items()}

    def _places(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of the rows' units, in order."""
        return np.concatenate([np.arange(self.ends[row], self.ends[row + 1]) for row in rows])

    def get(self, rows: Tensor) -> Tensor | TopK:
        """What is held of rows [batch], computing what is missing: logits [units, classes] float32, or likely tokens.

        For language models the units are the predicted tokens of the rows, in order.
        """
        numbers = rows.cpu().numpy()
        if not self.complete:
            wanted = self.chunk_of[numbers]
            for chunk in np.unique(wanted[~self.known[wanted]]):
                self._provide(chunk)
            self.complete = bool(self.known.all())
        taken = {
            name: torch.from_numpy(self.held.read(name, self._places(numbers))).to(self.run.device)
            for name in self.held.parts[0]
        }
        if self.kept is None:
            return taken["logits"]
        return TopK(taken["values"].float(), taken["ids"], taken["rest"])

    def _provide(self, chunk: int) -> None:
        """Check a chunk, and compute it where it is missing or damaged.

        Raises:
            ConfigProblem: it is, and there is no teacher to ask.
        """
        if not self._is_sound(chunk):
            if self.teacher is None:
                raise ConfigProblem(f"the teacher cache {self.folder} is damaged", why="a checksum does not fit")
            self.put(chunk, self._run_teacher(self.chunks[chunk]))
        self.known[chunk] = True

    def missing(self) -> list[int]:
        """Numbers of the chunks that are missing or damaged."""
        return [chunk for chunk in range(len(self.chunks)) if not self._is_sound(chunk)]

    def put(self, chunk: int, found: Mapping[str, np.ndarray]) -> None:
        """Fill a chunk: the units of its rows, in order, by the names of the tensors."""
        places = self._places(self.chunks[chunk])
        for name, values in found.items():
            self.held.write(name, places, values)
        self.sums[chunk] = _checksum(found)

    def _is_sound(self, chunk: int) -> bool:
        if not self.sums[chunk]:
            return False
        places = self._places(self.chunks[chunk])
        found = {name: self.held.read(name, places) for name in self.held.parts[0]}
        return bool(_checksum(found) == self.sums[chunk])

    @property
    def share(self) -> float:
        """Share of the chunks that are filled."""
        return float(np.mean(self.sums != 0))


def _dtype(run: Run) -> torch.dtype:
    return torch.float16 if run.dtype == "float16" else torch.bfloat16


def _unit_bytes(width: int, kept: Kept | None) -> int:
    """Bytes of a unit: float32 logits; or float16 values with int32 ids, and float32 for the rest."""
    return 6 * width + 4 if kept else 4 * width


def _checksum(values: Mapping[str, np.ndarray]) -> np.int32:
    """Checksum of a chunk's values, never 0."""
    found = 0
    for name in sorted(values):
        found = zlib.crc32(np.ascontiguousarray(values[name]).tobytes(), found)
    return np.uint32(found or 1).view(np.int32)
