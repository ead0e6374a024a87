"""A result read back from its folder, where a run was killed when only its last moves were missing."""

import json
import math
from pathlib import Path
from typing import Any

from kdtool.gates import GateResult
from kdtool.pipelines.output import MANIFEST
from kdtool.proof import Proof, Side


def read_proof(folder: Path) -> tuple[Proof, dict[str, Any]]:
    """What the manifest of a finished folder says.

    Args:
        folder: Holds `kdtool.json`.

    Returns:
        The proof, and the whole manifest. Reliability bins are not kept in manifests.
    """
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    student, teacher = _side(manifest, "student"), _side(manifest, "teacher")
    assert student is not None
    proof = Proof(student, teacher, _numbers(manifest["metrics"].get("retention")))
    proof.reload = manifest["reload"]
    for gate in manifest["gates"]:
        value = math.nan if gate["value"] is None else gate["value"]
        proof.gates.append(GateResult(gate["name"], gate["bound"], value, gate["passed"], gate["upper"]))
    if teacher is not None:
        shared = student.latency.keys() & teacher.latency.keys()
        proof.latency_ratio = {
            size: teacher.latency[size]["median_ms"] / student.latency[size]["median_ms"] for size in sorted(shared)
        }
    return proof, manifest


def _numbers(values: dict[str, Any] | None) -> dict[str, float]:
    """Metrics as they were written; null stands for what is not a number."""
    return {name: math.nan if value is None else value for name, value in (values or {}).items()}


def _side(manifest: dict[str, Any], role: str) -> Side | None:
    facts = manifest["models"].get(role)
    if facts is None:
        return None
    latency = {int(size): times for size, times in (manifest["latency"].get(role) or {}).items()}
    metrics, errors = (_numbers(manifest[key].get(role)) for key in ("metrics", "errors"))
    scaling = manifest.get("temperature_scaling", {}).get(role, {})
    return Side(**facts, metrics=metrics, errors=errors, latency=latency, scaling=scaling)
