"""What a run carries along: configuration-independent context, and nothing global."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class Reporter(Protocol):
    """Where progress and messages go; the command line, a log, or nothing."""

    def info(self, message: str) -> None:
        """Say what happens, in one line."""

    def warn(self, message: str) -> None:
        """Say what the user should know, in one line."""

    def progress(self, stage: str, done: int, total: int, facts: Mapping[str, float | str]) -> None:
        """Report a position in a long stage; called often, shown rarely."""


class Silent:
    """A reporter that says nothing: the default of the Python API."""

    def info(self, message: str) -> None:
        """Drop the message."""

    def warn(self, message: str) -> None:
        """Drop the message."""

    def progress(self, stage: str, done: int, total: int, facts: Mapping[str, float | str]) -> None:
        """Drop the position."""


@dataclass(slots=True)
class Run:
    """Context of one run.

    Attributes:
        seed: Seed of all generators.
        device: Device of models and batches, such as `cpu` or `cuda:0`.
        dtype: Autocast format, or None for float32 throughout.
        output: The output folder, or None when nothing is saved.
        rank: Number of this process among its peers.
        world: Number of processes.
        reporter: Where messages go.
        provenance: What was used: ids, revisions, hashes; ends up in the manifest.
    """

    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None
    output: Path | None = None
    reporter: Reporter = field(default_factory=Silent)
    rank: int = 0
    world: int = 1
    offline: bool = False
    cache_dir: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)
