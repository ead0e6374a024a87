"""The proof of a run: teacher and student side by side, and what the command line says of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kdtool.gates import GateResult, higher_is_better
from kdtool.writing import jsonable

_DONE = {
    "distill": "distilled",
    "compress": "compressed",
    "patch-attention": "patched",
    "evaluate": "evaluated",
    "export": "exported",
}


@dataclass(slots=True)
class Side:
    """One model of the comparison.

    Attributes:
        name: Folder or Hub id, as the user gave it.
        revision: Commit it was resolved to; None for folders.
        parameters: Number of parameters.
        bytes: Size of its weight files.
        metrics: Name to value on the test rows.
        errors: Name to standard error, where known.
        latency: Batch size to `median_ms` and `p95_ms` of one forward pass.
        reliability: (confidence, accuracy, count) of each confidence bin; None without classes.
        scaling: Temperature scaling: `temperature`, `rows` it was fitted on, and the calibration metrics on the test
            rows `before` and `after`; empty where it was not done.
        lengths: Sequence length to `median_ms`, `p95_ms` and `peak_bytes` of a forward pass of one sequence, and for
            a patched model `approximate` and `calls`, its calls of attention.
    """

    name: str
    revision: str | None
    parameters: int
    bytes: int
    metrics: dict[str, float]
    errors: dict[str, float] = field(default_factory=dict)
    latency: dict[int, dict[str, float]] = field(default_factory=dict)
    reliability: list[tuple[float, float, int]] | None = None
    scaling: dict[str, Any] = field(default_factory=dict)
    lengths: dict[int, dict[str, float | None]] = field(default_factory=dict)


@dataclass(slots=True)
class Proof:
    """What a run reached.

    Attributes:
        student: The model that was made (or evaluated).
        teacher: The model it is held against; None where there is none.
        retention: Metric to the share of the teacher that is kept; see `retention`.
        latency_ratio: Batch size to teacher's median latency divided by the student's.
        gates: Quality bars and what became of them.
        reload: `max_abs_diff`, `passed`, ... of the check in a fresh process; empty if not done.
        roles: What tables call the two models.
    """

    student: Side
    teacher: Side | None = None
    retention: dict[str, float] = field(default_factory=dict)
    latency_ratio: dict[int, float] = field(default_factory=dict)
    gates: list[GateResult] = field(default_factory=list)
    reload: dict[str, Any] = field(default_factory=dict)
    roles: tuple[str, str] = ("student", "teacher")


class Table(NamedTuple):
    """A table of text."""

    header: list[str]
    rows: list[list[str]]


def retention(student_metrics: Mapping[str, float], teacher_metrics: Mapping[str, float]) -> dict[str, float]:
    """How much of the teacher the student keeps: 1 is all of it, above 1 is better than the teacher.

    The ratio student / teacher where higher is better, teacher / student where lower is better. A
    metric is left out where one side lacks it or the ratio means nothing (not positive, not finite).
    """
    kept: dict[str, float] = {}
    for name, student in student_metrics.items():
        teacher = teacher_metrics.get(name, math.nan)
        upper, lower = (student, teacher) if higher_is_better(name) else (teacher, student)
        if math.isfinite(upper) and math.isfinite(lower) and upper >= 0.0 and lower > 0.0:
            kept[name] = upper / lower
    return kept


def number(value: float | None, error: float | None = None) -> str:
    """A metric to four significant places, with its standard error where known."""
    if value is None or not math.isfinite(value):
        return "-"
    text = f"{value:.4f}" if abs(value) < 100 else f"{value:,.2f}"
    return text if error is None or not math.isfinite(error) else f"{text} \u00b1 {error:.4f}"


def amount(value: float, unit: str = "") -> str:
    """A count in thousands, millions or billions: `4.39 M`, `17.6 MB` with unit B."""
    for limit, prefix in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:  # from here on three digits round up to the next prefix
            return f"{value / limit:.3g} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()


def _times(ratio: float, better: str, worse: str) -> str:
    """`2.10x smaller`, or `1.20x larger` where the ratio is below one."""
    if not math.isfinite(ratio) or ratio <= 0.0:
        return "-"
    if 0.995 < ratio < 1.005:
        return "same"
    return f"{ratio:.2f}x {better}" if ratio > 1.0 else f"{1 / ratio:.2f}x {worse}"


def _latency(entry: Mapping[str, Any] | None) -> str:
    if not entry or not math.isfinite(entry.get("median_ms", math.nan)):
        return "-"
    tail = f" (p95 {entry['p95_ms']:.2f})" if "p95_ms" in entry else ""
    return f"{entry['median_ms']:.2f}{tail}"


def table_of(proof: Proof) -> Table:
    """Metrics, size and latency: one row each, one column for each model and one for the comparison."""
    student, teacher = proof.student, proof.teacher
    rows: list[list[str]] = []
    names = list(student.metrics) + [n for n in (teacher.metrics if teacher else {}) if n not in student.metrics]
    for name in names:
        kept = f"{100 * proof.retention[name]:.1f} %" if name in proof.retention else "-"
        cells = [number(side.metrics.get(name), side.errors.get(name)) for side in (student, teacher) if side]
        rows.append([name, *cells, kept])
    for label, attribute, unit in (("parameters", "parameters", ""), ("file size", "bytes", "B")):
        sizes = [getattr(side, attribute) for side in (student, teacher) if side]
        ratio = sizes[1] / sizes[0] if len(sizes) > 1 and sizes[0] else math.nan
        rows.append([label, *(amount(size, unit) for size in sizes), _times(ratio, "smaller", "larger")])
    for batch in sorted({*student.latency, *(teacher.latency if teacher else ())}):
        cells = [_latency(side.latency.get(batch)) for side in (student, teacher) if side]
        ratio = proof.latency_ratio.get(batch, math.nan)
        rows.append([f"latency, batch {batch} (ms)", *cells, _times(ratio, "faster", "slower")])
    rows += _at_lengths([side for side in (student, teacher) if side])
    if teacher is None:
        return Table(["metric", "model"], [row[:2] for row in rows])
    return Table(["metric", *proof.roles, "kept"], rows)


def _at_lengths(sides: Sequence[Side]) -> list[list[str]]:
    """Time and memory of one sequence of each length."""
    rows: list[list[str]] = []
    for length in sides[0].lengths:
        found = [side.lengths[length] for side in sides]
        times = [one["median_ms"] or math.nan for one in found]
        sizes = [one["peak_bytes"] or math.nan for one in found]
        cells = [_latency(one) for one in found]
        rows.append([f"time, {length} tokens (ms)", *cells, _times(times[-1] / times[0], "faster", "slower")])
        cells = [amount(size, "B") if math.isfinite(size) else "-" for size in sizes]
        rows.append([f"memory, {length} tokens", *cells, _times(sizes[-1] / sizes[0], "less", "more")])
    return rows


@dataclass(slots=True)
class Result:
    """What a command gives back.

    Attributes:
        command: The subcommand.
        output: Folder or file that was made, as the user gave it; None if nothing was saved.
        proof: Quality, size and speed; None where nothing was measured.
        seconds: Wall time.
        steps: Optimiser steps; None without training.
        extra: Further fields of the `--json` object; `next` is the command to type next.
    """

    command: str
    output: Path | None
    proof: Proof | None
    seconds: float
    steps: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The `--json` object; undefined numbers are null."""
        proof = self.proof
        student, teacher = (proof.student, proof.teacher) if proof else (None, None)
        sides = {"student": student, "teacher": teacher}

        def each(attribute: str) -> dict[str, Any]:
            return {role: getattr(side, attribute) if side else {} for role, side in sides.items()}

        fixed = {
            "schema": 1,
            "command": self.command,
            "output": self.output,
            "model": student and {"parameters": student.parameters, "bytes": student.bytes},
            "teacher": teacher and _facts(teacher),
            "metrics": {**each("metrics"), "retention": proof.retention if proof else {}},
            "gates": proof.gates if proof else [],
            "seconds": round(self.seconds, 3),
            "steps": self.steps,
            "errors": each("errors"),
            "reliability": {role: reliability_rows(side) for role, side in sides.items()},
            "temperature_scaling": each("scaling"),
            "latency": {**each("latency"), "ratio": proof.latency_ratio if proof else {}},
            "reload": proof.reload if proof else {},
        }
        plain: dict[str, Any] = jsonable({**fixed, **{k: v for k, v in self.extra.items() if k not in fixed}})
        return plain

    @property
    def table(self) -> list[list[str]]:
        """The comparison as text, header first; empty where nothing was measured."""
        if self.proof is None:
            return []
        table = table_of(self.proof)
        return [table.header, *table.rows]

    @property
    def gates_missed(self) -> list[str]:
        """Gates that did not pass, each with what was reached: `accuracy 0.84 < 0.85`."""
        return [str(gate) for gate in self.proof.gates if not gate.passed] if self.proof else []

    @property
    def lines(self) -> list[str]:
        """What was made, where, how it compares, and the next command to type."""
        proof, done = self.proof, _DONE.get(self.command, "done")
        said = [f"{done}: {self._made()}" if proof or self.output else done]
        if self.command == "patch-attention" and "layers" in self.extra:
            said.append(f"attention: {_layers(self.extra['layers'])}")
        if proof and proof.student.metrics:
            said.append(f"quality: {_compared(proof)}")
        if proof and proof.gates:
            said.extend(f"gate {'passed' if gate.passed else 'MISSED'}: {gate}" for gate in proof.gates)
        if proof and proof.reload and not proof.reload.get("passed", True):
            said.append("reload MISSED: the saved model does not give the outputs of the one in memory")
        if self.extra.get("next"):
            said.append(f"next: {self.extra['next']}")
        return said

    def _made(self) -> str:
        if self.proof is None:
            return str(self.output)
        student, teacher = self.proof.student, self.proof.teacher
        text = f"{self.output or student.name} ({amount(student.parameters)} parameters, {amount(student.bytes, 'B')}"
        if teacher and student.bytes:
            text += f", {_times(teacher.bytes / student.bytes, 'smaller', 'larger')}".replace("same", "same size")
            ratios = self.proof.latency_ratio
            text += "".join(f", {_times(ratios[b], 'faster', 'slower')} at batch {b}" for b in sorted(ratios)[:1])
        return text + ")"


def reliability_rows(side: Side | None) -> list[dict[str, float | None]]:
    """Bins of a reliability diagram as mappings; what an empty bin lacks is null."""
    rows = (side.reliability or []) if side else []
    return [{"confidence": sure, "accuracy": right if count else None, "count": count} for sure, right, count in rows]


def _facts(side: Side) -> dict[str, Any]:
    return {"name": side.name, "revision": side.revision, "parameters": side.parameters, "bytes": side.bytes}


def _layers(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many attention modules are approximate, and why the first of the others is not."""
    left = [row for row in rows if "reason" in row]
    said = f"{len(rows) - len(left)} of {len(rows)} layers are approximate"
    return f"{said}; layer {left[0]['number']} is exact: {left[0]['reason']}" if left else said


def _compared(proof: Proof) -> str:
    """The main metric in words."""
    name, value = next(iter(proof.student.metrics.items()))
    text = f"{name} {number(value, proof.student.errors.get(name))}"
    if proof.teacher and name in proof.teacher.metrics:
        text += f", {proof.roles[1]} {number(proof.teacher.metrics[name], proof.teacher.errors.get(name))}"
        if name in proof.retention:
            text += f" ({100 * proof.retention[name]:.1f} % kept)"
    return text
