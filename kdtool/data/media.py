"""Columns of images and audio that decode on indexing, picklable for worker processes."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from kdtool.data.examples import LazyColumn
from kdtool.errors import DataProblem, UsageProblem

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3"})


def _home(root: Path) -> Path:
    """Where the files of a data folder lie; those of a Hub snapshot are links to blobs beside it."""
    real = root.resolve()
    for parent in (real, *real.parents):
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent
    return real


class MediaColumn(LazyColumn):
    """Encoded media, as bytes or as files, behind a list of row numbers.

    Args:
        values: Arrow column: struct of `bytes` and `path`, binary, or text (file paths).
        where: The column in messages, such as `column 'image' of train`.
        root: Folder that files must lie in; None where bytes or absolute paths of a cache are used.
        rows: [rows] positions in `values`; all of them by default.
    """

    kind = "media"

    def __init__(self, values: pa.ChunkedArray, where: str, root: Path | None, rows: np.ndarray | None = None) -> None:
        self._values = values
        self._where = where
        self._root = root
        self._rows = np.arange(len(values)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The rows at `indices`, in that order; nothing is decoded."""
        return type(self)(self._values, self._where, self._root, self._rows[np.asarray(indices, dtype=np.int64)])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        row = int(self._rows[index])
        encoded = self._encoded(row)
        try:
            return self._decode(encoded)
        except (OSError, ValueError, RuntimeError, SyntaxError) as error:
            raise DataProblem(
                f"{self._where}, row {row + 1}: this {self.kind} cannot be decoded",
                why=" ".join(str(error).split())[:200],
            ) from None

    def _encoded(self, row: int) -> bytes:
        value = self._values[row].as_py()
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not value:
            raise DataProblem(f"{self._where}, row {row + 1}: no {self.kind}")
        return value if isinstance(value, bytes) else self._file(value, row).read_bytes()

    def _file(self, name: str, row: int) -> Path:
        """The file a row names.

        Raises:
            DataProblem: it does not exist, or lies outside the data folder.
        """
        path = Path(name) if self._root is None else Path(os.path.normpath(self._root / name))
        if self._root is not None and not path.is_relative_to(self._root):
            raise DataProblem(f"{self._where}, row {row + 1}: '{name}' lies outside the data folder")
        if not path.is_file():
            raise DataProblem(f"{self._where}, row {row + 1}: file '{name}' does not exist")
        if self._root is not None and not path.resolve().is_relative_to(_home(self._root)):
            raise DataProblem(
                f"{self._where}, row {row + 1}: '{name}' is a link that leads outside the data folder",
                hint="put the file itself there",
            )
        return path

    def _decode(self, encoded: bytes) -> Any:
        raise NotImplementedError


class ImageColumn(MediaColumn):
    """Images; indexing gives a PIL image in RGB mode."""

    kind = "image"

    def _decode(self, encoded: bytes) -> Any:
        try:
            from PIL import Image
        except ImportError:
            raise UsageProblem(
                "images need Pillow, which is not installed", hint="pip install 'kdtool[vision]'"
            ) from None
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                return image.convert("RGB")
        except Image.DecompressionBombError as error:
            raise ValueError(str(error)) from None


class AudioColumn(MediaColumn):
    """Recordings; indexing gives `array` ([samples] float32, mono, -1 to 1) and `sampling_rate` (Hz)."""

    kind = "recording"

    def _decode(self, encoded: bytes) -> dict[str, Any]:
        try:
            import soundfile
        except (ImportError, OSError):
            raise UsageProblem(
                "audio needs soundfile, which is not installed", hint="pip install 'kdtool[audio]'"
            ) from None
        samples, rate = soundfile.read(io.BytesIO(encoded), dtype="float32", always_2d=True)
        return {"array": np.ascontiguousarray(samples.mean(axis=1, dtype=np.float32)), "sampling_rate": int(rate)}
