"""What a run leaves beside the model: the manifest kdtool.json, report.md and its plots."""

from kdtool.proof import Proof, Result, Side, Table, retention
from kdtool.report._comparison import draw_comparison
from kdtool.report._manifest import write_manifest
from kdtool.report._markdown import markdown_table, write_report
from kdtool.writing import redact

__all__ = [
    "Proof",
    "Result",
    "Side",
    "Table",
    "draw_comparison",
    "markdown_table",
    "redact",
    "retention",
    "write_manifest",
    "write_report",
]
