"""Data on disk: which splits a folder, a file or a shipped set holds, found by name alone."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa

from kdtool.data.media import AUDIO_SUFFIXES, IMAGE_SUFFIXES
from kdtool.data.readers import TABLE_SUFFIXES, file_sha256, is_untyped, read_table, table_suffix
from kdtool.errors import DataProblem

SHIPPED = Path(__file__).resolve().parent.parent / "quickstart"
TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
TEST_NAMES = ("test", "testing")
_SHARD = re.compile(r"(?P<split>.+?)-(?P<index>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?")
_HASHED_WHOLE = 2 << 30  # bytes; larger media folders are hashed by names and sizes


@dataclass(frozen=True, slots=True)
class RawSplit:
    """Rows as they come from the source.

    Attributes:
        table: All columns.
        class_names: Column to class names, where the source declares them.
        sha256: File name to digest of what was read.
        untyped: Whether numbers are written as text (csv, tsv).
    """

    table: pa.Table
    class_names: Mapping[str, list[str]] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
    untyped: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """A source of data, nothing of it read yet.

    Attributes:
        name: As the user wrote it.
        form: folder, file, shipped, images, audio, or hub.
        splits: Split name to a function that reads it.
        root: Folder that media files must lie in, where there is one.
        labels: Class names from labels.json.
        revision: Commit on the Hub.
    """

    name: str
    form: str
    splits: Mapping[str, Callable[[], RawSplit]]
    root: Path | None = None
    labels: list[str] | None = None
    revision: str | None = None


def shipped_names() -> list[str]:
    """Names of the data sets inside the package."""
    if not SHIPPED.is_dir():
        return []
    return sorted(folder.name for folder in SHIPPED.iterdir() if any(folder.glob("*.jsonl.gz")))


def open_disk(path: Path, name: str, form: str) -> Source:
    """Describe the data at a path that exists.

    Raises:
        DataProblem: it is no data file, or a folder without one.
    """
    path = path.absolute()
    if path.is_dir():
        return _open_folder(path, name, form)
    if table_suffix(path.name) is None:
        raise DataProblem(f"'{name}' is no data file", hint=f"files that can be read: {' '.join(TABLE_SUFFIXES)}")
    labels = _read_labels(path.parent)
    return Source(name, "file", {"train": partial(_read_files, [path], path.parent)}, path.parent, labels)


def _open_folder(folder: Path, name: str, form: str) -> Source:
    files = _table_splits(folder)
    if files:
        splits: dict[str, Callable[[], RawSplit]] = {
            split: partial(_read_files, paths, folder) for split, paths in files.items()
        }
        return Source(name, form, splits, folder, _read_labels(folder))
    media = _media_splits(folder)
    if not media:
        raise DataProblem(
            f"folder '{name}' holds no data files",
            hint="it should hold train|validation|test with .jsonl, .csv or .parquet, or CLASS/*.png|jpg|wav|flac",
        )
    column = _media_column([path for paths in media.values() for path in paths], name)
    found = {split: partial(_read_media, paths, folder, column) for split, paths in media.items()}
    return Source(name, "images" if column == "image" else "audio", found, folder, _read_labels(folder))


def _read_labels(folder: Path) -> list[str] | None:
    path = folder / "labels.json"
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataProblem(f"{path} cannot be read", why=" ".join(str(error).split())) from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataProblem(f"{path} is not a list of class names in id order", hint='such as ["negative", "positive"]')
    return names


def _table_splits(folder: Path) -> dict[str, list[Path]]:
    """Split name to its files, in the folder and its `data` subfolder.

    Raises:
        DataProblem: a split is there twice, or lacks shards.
    """
    found: dict[str, list[list[Path]]] = {}
    shards: dict[tuple[str, int], dict[int, Path]] = {}
    places = [place for place in (folder, folder / "data") if place.is_dir()]
    for path in sorted(path for place in places for path in place.iterdir() if path.is_file()):
        suffix = table_suffix(path.name)
        if suffix is None or path.name.startswith(".") or _is_metadata(path):
            continue
        stem = path.name[: -len(suffix)]
        match = _SHARD.fullmatch(stem)
        if match:
            shards.setdefault((match["split"], int(match["count"])), {})[int(match["index"])] = path
        else:
            found.setdefault(stem, []).append([path])
    for (split, count), parts in shards.items():
        missing = sorted(set(range(count)) - set(parts))
        if missing:
            raise DataProblem(
                f"split '{split}' in {folder} is not complete: part {missing[0]:05d} of {count:05d} is missing",
                hint="fetch the missing files",
            )
        found.setdefault(split, []).append([parts[index] for index in range(count)])
    for split, versions in found.items():
        if len(versions) > 1:
            names = ", ".join(str(paths[0].relative_to(folder)) for paths in versions)
            raise DataProblem(
                f"split '{split}' in {folder} is there more than once: {names}", hint="give one file as the data"
            )
    return {split: versions[0] for split, versions in found.items()}


def _is_metadata(path: Path) -> bool:
    return path.name in {"labels.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def _read_files(paths: Sequence[Path], folder: Path) -> RawSplit:
    tables = [read_table(path) for path in paths]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        why = " ".join(str(error).split())[:200]
        raise DataProblem(f"the parts of {paths[0].name} do not fit together", why=why) from None
    digests = {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}
    return RawSplit(table, _declared_classes(tables[0].schema), digests, is_untyped(paths[0]))


def _declared_classes(schema: pa.Schema) -> dict[str, list[str]]:
    """Class names in the feature description that the Hub's libraries leave in parquet files."""
    try:
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except ValueError:
        return {}
    features = described.get("info", {}).get("features", {}) if isinstance(described, dict) else {}
    return {
        column: list(feature["names"])
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def _media_splits(folder: Path) -> dict[str, list[Path]]:
    """Split name to media files, for `split/class/file` and `class/file`."""
    inner = _folders(folder)
    split_names = {*TRAIN_NAMES, *VALIDATION_NAMES, *TEST_NAMES}
    if any(sub.name in split_names and _folders(sub) for sub in inner):
        found = {sub.name: _class_files(sub) for sub in inner}
    else:
        found = {"train": _class_files(folder)}
    return {split: paths for split, paths in found.items() if paths}


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _class_files(folder: Path) -> list[Path]:
    known = IMAGE_SUFFIXES | AUDIO_SUFFIXES
    return [
        path
        for sub in _folders(folder)
        for path in sorted(sub.iterdir())
        if path.suffix.lower() in known and path.is_file() and not path.name.startswith(".")
    ]


def _media_column(paths: Sequence[Path], name: str) -> str:
    images = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in paths)
    if images not in (0, len(paths)):
        raise DataProblem(
            f"folder '{name}' mixes {images} images and {len(paths) - images} recordings", hint="separate them"
        )
    return "image" if images else "audio"


def _read_media(paths: Sequence[Path], folder: Path, column: str) -> RawSplit:
    names = [path.relative_to(folder).as_posix() for path in paths]
    table = pa.table({column: pa.array(names), "label": pa.array([path.parent.name for path in paths])})
    digest = hashlib.sha256()
    whole = sum(path.stat().st_size for path in paths) <= _HASHED_WHOLE
    for name, path in zip(names, paths, strict=True):
        content = file_sha256(path) if whole else str(path.stat().st_size)
        digest.update(f"{name}\0{content}\n".encode())
    key = f"{len(paths)} files, by {'content' if whole else 'size'}"
    return RawSplit(table, {}, {key: digest.hexdigest()})
