"""Reference values: every case of NAME.json + NAME.safetensors in the folder KDTOOL_GOLDEN_DIR.

`cases(NAME)` is made for `pytest.mark.parametrize`. The files come in a few forms (cases as a list or
a mapping, hyper-parameters in `hyper` or beside the tensors); a `Case` looks the same for all.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor


def folder() -> Path:
    return Path(os.environ.get("KDTOOL_GOLDEN_DIR") or Path(__file__).parent)


class Tolerance(dict[str, Any]):
    """The file's tolerances; `of(KEY, ...)` gives the arguments of a comparison for the first key present."""

    def of(self, *keys: str) -> dict[str, float]:
        for key in (*keys, "default"):
            if isinstance(self.get(key), Mapping):
                chosen = self[key]
                break
        else:
            chosen = self
        return {"rtol": float(chosen.get("rtol", 0.0)), "atol": float(chosen.get("atol", 0.0))}


@dataclass(frozen=True)
class Case:
    """One case: `hyper` holds its parameters, `entry` all the JSON says of it, `document` the whole file."""

    name: str
    id: str
    entry: Mapping[str, Any]
    document: Mapping[str, Any] = field(repr=False)

    @property
    def hyper(self) -> Mapping[str, Any]:
        return self.entry.get("hyper", self.entry)

    @property
    def tolerance(self) -> Tolerance:
        own = self.entry.get("tolerance")
        return Tolerance(own if isinstance(own, Mapping) else self.document.get("tolerance") or {})

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        prefix = f"{self.id}."
        with safe_open(folder() / f"{self.name}.safetensors", "pt") as file:
            return {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118

    def roles(self, role: str) -> list[str]:
        """Names of the tensors whose role starts with `role`, such as `input` or `output`."""
        described = self.entry.get("tensors") or {}
        return [
            key for key, facts in described.items() if isinstance(facts, Mapping) and facts["role"].startswith(role)
        ]


def load(name: str) -> list[Case]:
    """All cases of a file, in its order."""
    document = json.loads((folder() / f"{name}.json").read_text(encoding="utf-8"))
    found = document["cases"]
    if isinstance(found, Mapping):
        return [Case(name, key, entry, document) for key, entry in found.items()]
    return [Case(name, entry["id"] if "id" in entry else entry["name"], entry, document) for entry in found]


def cases(name: str) -> list[Any]:
    """All cases of a file as parameters of a test; none, and so a skip, where the folder lacks the file."""
    if not (folder() / f"{name}.json").is_file():
        return [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=f"no {name}.json in the golden folder"))]
    return [pytest.param(case, id=case.id) for case in load(name)]
