"""The output folder: claimed before work, filled in one sweep after it, never half-written.

While a run is unfinished the folder holds `.kdtool/` with the claim (`run.json`), checkpoints and
staged files. When everything is ready the claim turns to `moving` and lists the staged files; they
move into the folder one by one, the manifest last, and `.kdtool/` goes, the claim last. A kill in
between leaves that claim; the same command then completes the moves and is done.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdtool.errors import OutputProblem, UsageProblem
from kdtool.sections import RunConfig
from kdtool.train.checkpoint import sync

WORK = ".kdtool"
MANIFEST = "kdtool.json"
KEPT_TEACHER = "teacher"
"""Folder inside the output where a trained teacher is kept."""
_WEIGHTS = ("*.safetensors*", "*.onnx*", "openvino_model.*")


def fingerprint(config: RunConfig) -> str:
    """Hash of everything in a configuration that shapes the result."""
    values = config.model_dump(mode="json")
    values["output"] = {key: values["output"][key] for key in ("dtype", "max_shard_size")}
    values["train"].pop("resume")
    values["eval"].pop("fail_under")
    values["patch"].pop("max_drop")
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Output:
    """One claimed output folder.

    Args:
        folder: Where the result goes; made if absent.
        config: The run's configuration; its fingerprint tells resumable runs from others.
        writer: False for a process that leaves the folder to another one.

    Attributes:
        kept: Where files are written during training that belong to the result.
        complete: True when only the last moves of this very run were missing and are made now.

    Raises:
        UsageProblem: the folder is in use.
        OutputProblem: it cannot be written.
    """

    def __init__(self, folder: Path, config: RunConfig, writer: bool = True) -> None:
        self.folder = folder
        self.work = folder / WORK
        self.staging = self.work / "staging"
        self.checkpoints = self.work / "checkpoints"
        self.kept = self.work / "kept"
        self.mark = fingerprint(config)
        self.writer = writer
        self.complete = False
        if writer:
            self._begin(config)

    def _begin(self, config: RunConfig) -> None:
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise UsageProblem(f"output '{folder}' is a file", hint="name a folder with -o")
        claim = self._claim()
        same = claim.get("fingerprint") == self.mark
        if claim.get("state") == "moving":
            self._move(claim["files"])
            self.complete = same and config.train.resume
            if self.complete:
                return
            same = False
        if not same or not config.train.resume:
            self._refuse_in_use(config)
            shutil.rmtree(self.work, ignore_errors=True)
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._write_claim({"state": "working"})
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging.mkdir()
        except OSError as error:
            raise OutputProblem(
                f"output '{folder}' cannot be written", why=error.strerror, hint="name another folder with -o"
            ) from None

    def _claim(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.work / "run.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def _refuse_in_use(self, config: RunConfig) -> None:
        if config.output.overwrite or not self.folder.exists():
            return
        held = {path.name for path in self.folder.iterdir()}
        claimed = (self.work / "run.json").is_file()
        if held - {WORK} or claimed:  # without a claim `.kdtool` is what a kill left of one
            what = "an unfinished run of another configuration" if claimed else "files"
            raise UsageProblem(
                f"output '{self.folder}' already holds {what}", hint="name another folder with -o, or pass --overwrite"
            )

    def _write_claim(self, claim: dict[str, Any]) -> None:
        partial = self.work / "run.json.partial"
        partial.write_text(json.dumps({"fingerprint": self.mark, **claim}), encoding="utf-8")
        sync(partial)
        partial.replace(self.work / "run.json")
        sync(self.work)

    def commit(self) -> None:
        """Move the staged files into the folder and end the claim."""
        for path in self.staging.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes 0600 whatever the umask
            sync(path)
        sync(self.staging)
        files = [path.relative_to(self.staging) for path in self.staging.rglob("*") if path.is_file()]
        files.sort(key=lambda path: (path.name == MANIFEST, str(path)))
        self._write_claim({"state": "moving", "files": [path.as_posix() for path in files]})
        self._move([path.as_posix() for path in files])

    def _move(self, files: list[str]) -> None:
        """Move what has not been moved yet, then end the claim; may be cut off and repeated at any point."""
        for name in files:
            target = self.folder / name
            if (self.staging / name).is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                (self.staging / name).replace(target)
        if MANIFEST in files:
            for old in [path for pattern in _WEIGHTS for path in self._weights(pattern)]:
                # a stale shard, index, graph or kept teacher beside new weights would be loaded by others
                if old.relative_to(self.folder).as_posix() not in files:
                    old.unlink()
        for folder in {(self.folder / name).parent for name in files}:
            sync(folder)
        sync(self.folder)
        self._end()

    def _weights(self, pattern: str) -> list[Path]:
        """Weight files of the result and of a teacher kept beside it."""
        return [*self.folder.glob(pattern), *self.folder.glob(f"{KEPT_TEACHER}/{pattern}")]

    def _end(self) -> None:
        """Remove `.kdtool`, the claim last, so that a kill in between leaves a claim that can be ended again."""
        for path in self.work.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != "run.json":
                path.unlink()
        (self.work / "run.json").unlink(missing_ok=True)
        self.work.rmdir()

    def _bought(self) -> Iterator[Path]:
        """Rows that were written for this run, by a model or an endpoint, and what a server said of its end."""
        found = (*self.kept.rglob("*.jsonl*"), *self.kept.rglob("*.log"))
        return (path for path in found if path.stat().st_size)

    def release(self) -> None:
        """Give up a claim that has nothing worth keeping."""
        if not self.writer or not self.work.exists() or any(self.checkpoints.rglob("step-*")) or any(self._bought()):
            return
        if self._claim().get("state") != "moving":
            self._end()
            if self.folder.exists() and not any(self.folder.iterdir()):
                self.folder.rmdir()
