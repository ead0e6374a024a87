"""The output folder: claimed before work, filled in one sweep after it, never half-written.

While a run is unfinished the folder holds `.kdtool/` with the claim (`run.json`), checkpoints and
staged files. When everything is ready the staged files move into the folder one by one, the
manifest last, and `.kdtool/` goes. A kill in between leaves a claim in state `moving`; the same
command then completes the moves.
"""

import hashlib
import json
import shutil
from pathlib import Path

from kdtool.config import RunConfig
from kdtool.errors import OutputProblem, UsageProblem
from kdtool.train.checkpoint import sync

WORK = ".kdtool"
MANIFEST = "kdtool.json"


def fingerprint(config: RunConfig) -> str:
    """Hash of everything in a configuration that shapes the result."""
    values = config.model_dump(mode="json")
    values["output"] = {key: values["output"][key] for key in ("dtype", "max_shard_size")}
    values["train"].pop("resume")
    values["eval"].pop("fail_under")
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Output:
    """One claimed output folder.

    Args:
        folder: Where the result goes; made if absent.
        config: The run's configuration; its fingerprint tells resumable runs from others.
        writer: False for a process that leaves the folder to another one.

    Raises:
        UsageProblem: the folder is in use.
        OutputProblem: it cannot be written.
    """

    def __init__(self, folder: Path, config: RunConfig, writer: bool = True) -> None:
        self.folder = folder
        self.work = folder / WORK
        self.staging = self.work / "staging"
        self.checkpoints = self.work / "checkpoints"
        self.mark = fingerprint(config)
        self.writer = writer
        if writer:
            self._begin(config)

    def _begin(self, config: RunConfig) -> None:
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise UsageProblem(f"output '{folder}' is a file", hint="name a folder with -o")
        claim = self._claim()
        if claim and claim.get("state") == "moving":
            self._move()
            claim = {}
        same = bool(claim) and claim.get("fingerprint") == self.mark
        if not same or not config.train.resume:
            self._refuse_in_use(config)
            shutil.rmtree(self.work, ignore_errors=True)
        shutil.rmtree(self.staging, ignore_errors=True)
        try:
            self.staging.mkdir(parents=True)
            self._write_claim("working")
        except OSError as error:
            raise OutputProblem(f"output '{folder}' cannot be written", why=error.strerror) from None

    def _claim(self) -> dict[str, str]:
        try:
            return dict(json.loads((self.work / "run.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def _refuse_in_use(self, config: RunConfig) -> None:
        if config.output.overwrite or not self.folder.exists():
            return
        if any(self.folder.iterdir()):
            what = "an unfinished run of another configuration" if self.work.exists() else "files"
            raise UsageProblem(
                f"output '{self.folder}' already holds {what}", hint="name another folder with -o, or pass --overwrite"
            )

    def _write_claim(self, state: str) -> None:
        partial = self.work / "run.json.partial"
        partial.write_text(json.dumps({"fingerprint": self.mark, "state": state}), encoding="utf-8")
        sync(partial)
        partial.replace(self.work / "run.json")
        sync(self.work)

    def commit(self) -> None:
        """Move the staged files into the folder and end the claim."""
        for path in self.staging.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes 0600 whatever the umask
            sync(path)
        self._write_claim("moving")
        self._move()

    def _move(self) -> None:
        kept = {path.relative_to(self.staging) for path in self.staging.rglob("*") if path.is_file()}
        for old in self.folder.glob("*.safetensors*"):
            # a stale shard or index beside new weights would be loaded by others
            if old.relative_to(self.folder) not in kept and (self.staging / MANIFEST).is_file():
                old.unlink()
        for path in sorted(kept, key=lambda p: (p.name == MANIFEST, str(p))):
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.staging / path).replace(self.folder / path)
        sync(self.folder)
        shutil.rmtree(self.work, ignore_errors=True)

    def release(self) -> None:
        """Give up a claim that has nothing worth keeping."""
        if self.writer and self.work.exists() and not any(self.checkpoints.glob("step-*")):
            shutil.rmtree(self.work, ignore_errors=True)
            if self.folder.exists() and not any(self.folder.iterdir()):
                self.folder.rmdir()
