"""What an exporter gives back."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What became of an export.

    Attributes:
        dtype: Number format of the weights written.
        files: Names of the files written.
        parity: `max_abs_diff`, `tolerance`, `passed`, ... of the exported model against the source.
        facts: More to record.
    """

    dtype: str
    files: list[str]
    parity: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
