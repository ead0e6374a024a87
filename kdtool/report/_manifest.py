"""kdtool.json: everything needed to repeat a run and to check its files."""

import hashlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import kdtool
from kdtool.proof import Proof
from kdtool.run import Run
from kdtool.sections import RunConfig
from kdtool.writing import as_text, typed, write_text

MANIFEST = "kdtool.json"

_PACKAGES = ("torch", "transformers", "safetensors", "huggingface-hub", "accelerate", "tokenizers", "numpy")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name; Linux says it only in /proc."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Python, platform, package versions, processor and threads; nothing that names the machine or user."""
    torch = sys.modules.get("torch")  # never imported for this: a run that used it has it loaded
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {package: _version(package) for package in _PACKAGES},
        "cpu": _processor(),
        "threads": torch.get_num_threads() if torch else os.cpu_count(),
    }


def _artefacts(folder: Path) -> Iterator[Path]:
    """Files of the result, sorted; hidden files (checkpoints, unfinished writes) and links are not part of it."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith(".") and not path.is_symlink() and path != folder / MANIFEST:
                yield path


def hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """SHA-256 and size in bytes of every file of a result folder, by relative path."""
    found = {}
    for path in _artefacts(folder):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = {"sha256": digest, "bytes": path.stat().st_size}
    return dict(sorted(found.items()))


def _repeatable(config: RunConfig) -> dict[str, Any]:
    """The configuration as it should be fed back: without leave to replace a folder."""
    values = config.model_dump(mode="json")
    values["output"]["overwrite"] = False
    return values


def write_manifest(
    folder: Path,
    config: RunConfig,
    proof: Proof | None,
    run: Run,
    command_line: str | Sequence[str],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write `kdtool.json`, a configuration for `-c` and a record of the run; call it last.

    Args:
        folder: The result folder; all other files must be there, since they are hashed.
        config: The resolved configuration.
        proof: What was measured, or None.
        run: Gives the seed and what was used (provenance).
        command_line: As typed, or its words.
        extra: Further fields such as `seconds` and `steps`; they never replace the fields above.

    Raises:
        OutputProblem: the folder cannot be written.
    """
    sides = {"student": proof.student, "teacher": proof.teacher} if proof else {}
    fixed = {
        "kdtool": kdtool.__version__,
        "command": typed(command_line),
        "config": _repeatable(config),
        "provenance": run.provenance,
        "environment": environment(),
        "seed": run.seed,
        "metrics": {role: side.metrics for role, side in sides.items() if side}
        | {"retention": proof.retention if proof else {}},
        "errors": {role: side.errors for role, side in sides.items() if side},
        "temperature_scaling": {role: side.scaling for role, side in sides.items() if side and side.scaling},
        "models": {
            role: {"name": side.name, "revision": side.revision, "parameters": side.parameters, "bytes": side.bytes}
            for role, side in sides.items()
            if side
        },
        "latency": {role: side.latency for role, side in sides.items() if side},
        "gates": proof.gates if proof else [],
        "reload": proof.reload if proof else {},
        "seconds": None,
    }
    given = {key: value for key, value in (extra or {}).items() if key == "seconds" or key not in fixed}
    write_text(folder / MANIFEST, as_text({**fixed, **given, "files": hashes(folder)}))
