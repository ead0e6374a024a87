"""The client's cache as kdtool uses it: which commit a name stood for, and what is complete.

The client records the commit of a branch only when it is asked for the branch; kdtool asks for
commits, so it keeps that record itself, in the client's own layout. While files of a snapshot are
missing, a mark lies beside the snapshots; what has no mark and holds weights is complete.
"""

import json
import os
import re
import time
import uuid
from pathlib import Path
from typing import Literal

Kind = Literal["model", "dataset"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_STALE_SECONDS = 24 * 3600.0


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit, which never changes its meaning."""
    return revision is not None and bool(_COMMIT.fullmatch(revision))


def storage(kind: Kind, name: str, cache_dir: str | None) -> Path:
    """Folder of a repository in the cache; it need not exist."""
    from huggingface_hub import constants

    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser() / "--".join([f"{kind}s", *name.split("/")])


def _ref(folder: Path, revision: str | None) -> Path | None:
    path = folder / "refs" / (revision or "main")
    inside = Path(os.path.normpath(path)).is_relative_to(Path(os.path.normpath(folder / "refs")))
    return path if inside else None


def remember(folder: Path, revision: str | None, commit: str) -> None:
    """Record which commit a branch or tag stands for, so that it can be used without a network."""
    path = _ref(folder, revision)
    if path is None or is_commit(revision):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    partial.write_text(commit, encoding="utf-8")
    partial.replace(path)


def recall(folder: Path, revision: str | None) -> str | None:
    """The commit that a revision stood for when it was last asked for; None when it never was."""
    if is_commit(revision):
        return revision
    path = _ref(folder, revision)
    try:
        commit = path.read_text(encoding="utf-8").strip() if path else ""
    except OSError:
        return None
    return commit if is_commit(commit) else None


class Unfinished:
    """The mark of a snapshot that still lacks files."""

    def __init__(self, folder: Path, commit: str) -> None:
        self.path = folder / f".kdtool-{commit}.partial"

    def put(self) -> None:
        """Say that files are missing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()

    def take_away(self) -> None:
        """Say that all files are there."""
        self.path.unlink(missing_ok=True)


def snapshot(folder: Path, commit: str, weights: bool, allow_pickle: bool) -> Path | None:
    """A complete snapshot of a model.

    Args:
        folder: From `storage`.
        commit: Full commit.
        weights: Whether weights are needed, or only config.json.
        allow_pickle: Whether pickle weights count.
    """
    found = folder / "snapshots" / commit
    if not (found / "config.json").is_file():
        return None
    if not weights:
        return found
    if Unfinished(folder, commit).path.exists() or not _has_weights(found, allow_pickle):
        return None
    return found


def _has_weights(found: Path, allow_pickle: bool) -> bool:
    index = found / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            return False
        return all((found / str(shard)).is_file() for shard in shards)
    return any(found.glob("*.safetensors")) or (allow_pickle and any(found.glob("*.bin")))


def drop_stale(folder: Path) -> None:
    """Delete what killed downloads left behind over a day ago; the client starts those files anew anyway."""
    for path in (folder / "blobs").glob("*.incomplete"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
        except OSError:
            continue  # another process was faster, or it is not ours to delete
