"""Text that leaves the process: without secrets, valid as JSON, written whole or not at all."""

import json
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from kdtool.errors import OutputProblem

_SECRET = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}|\bsk-(?:[A-Za-z]+-)*[A-Za-z0-9_]{20,}")
_TOKEN_OPTION = re.compile(r"(--token[ =]|HF_TOKEN=)(?:'[^']*'|\"[^\"]*\"|[^\s'\"`]+)")
_MARK = "[redacted]"


def redact(text: str) -> str:
    """Replace access tokens, and whatever follows `--token`, by `[redacted]`."""
    return _SECRET.sub(_MARK, _TOKEN_OPTION.sub(rf"\1{_MARK}", text))


def typed(command_line: str | Sequence[str]) -> str:
    """A command line as one would type it, without secrets."""
    text = command_line if isinstance(command_line, str) else shlex.join(command_line)
    return redact(text)


def jsonable(value: Any) -> Any:
    """Turn a value into plain JSON: nan and infinities become null, keys strings, secrets marks.

    Dataclasses become objects, paths and anything unknown text, sets sorted lists.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {redact(str(key)): jsonable(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((jsonable(item) for item in value), key=str)
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: jsonable(getattr(value, item.name)) for item in fields(value)}
    if type(value).__module__ == "numpy":
        return jsonable(value.tolist())
    return redact(str(value))


def as_text(value: Any) -> str:
    """Indented JSON with a final newline; also valid YAML, so that manifests are configurations."""
    return json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file through a temporary sibling, so that a kill leaves the old file or the new one.

    Raises:
        OutputProblem: the disk or its permissions refuse.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OutputProblem(
            f"cannot write {path}", why=error.strerror, hint="choose another folder with -o, or free some space"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8 without secrets; see `write_bytes`."""
    write_bytes(path, redact(text).encode("utf-8"))
