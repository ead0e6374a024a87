"""report.md: the proof for people."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdtool.proof import Proof, Side, Table, number, table_of
from kdtool.sections import RunConfig
from kdtool.writing import write_text

_CALIBRATION = ("ece", "adaptive-ece", "classwise-ece", "mce", "nll", "brier")


def markdown_table(table: Table) -> str:
    """A table in Markdown: first column left, the others right."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "| --- |" + " ---: |" * (len(table.header) - 1)
    return "\n".join([line(table.header), rule, *map(line, table.rows)])


def _confidence(role: str, side: Side) -> str | None:
    """How sure a model is against how often it is right, in one sentence."""
    bins = [entry for entry in side.reliability or [] if entry[2]]
    total = sum(count for _, _, count in bins)
    if not total:
        return None
    sure = sum(confidence * count for confidence, _, count in bins) / total
    right = sum(accuracy * count for _, accuracy, count in bins) / total
    off = 100 * (sure - right)
    verdict = "about as sure as it is right" if abs(off) < 0.5 else f"{'over' if off > 0 else 'under'}-confident"
    return (
        f"- The {role} is {verdict}: mean confidence {100 * sure:.1f} %, accuracy {100 * right:.1f} % ({total:,} rows)."
    )


def _calibration(proof: Proof) -> list[str]:
    roles = [(proof.roles[0] if proof.teacher else "model", proof.student)]
    roles += [(proof.roles[1], proof.teacher)] if proof.teacher else []
    lines = [line for role, side in roles if (line := _confidence(role, side))]
    for name, value in proof.student.metrics.items():
        if name.replace("_", "-") in _CALIBRATION:
            versus = number(proof.teacher.metrics.get(name)) if proof.teacher else "-"
            lines.append(f"- {name}: {number(value)}" + (f" ({proof.roles[1]} {versus})" if versus != "-" else ""))
    return ["## Calibration", "", *lines, "", *_scaled(roles)] if lines else []


def _scaled(roles: Sequence[tuple[str, Side]]) -> list[str]:
    """Calibration before and after temperature scaling, a pair of columns for each model."""
    done = [(role, side.scaling) for role, side in roles if side.scaling]
    if not done:
        return []
    shown = " and ".join(f"{found['temperature']:.3f} ({role})" for role, found in done)
    header = ["metric", *(f"{role}, {when}" for role, _ in done for when in ("as it is", "scaled"))]
    rows = [
        [name, *(number(found[when].get(name)) for _, found in done for when in ("before", "after"))]
        for name in done[0][1]["before"]
    ]
    said = f"Logits divided by a temperature that fits {done[0][1]['rows']:,} validation rows best: {shown}."
    return [said, "The saved model is not changed by it.", "", markdown_table(Table(header, rows)), ""]


def _gates(proof: Proof) -> list[str]:
    lines: list[str] = []
    if proof.gates:
        rows = [
            [
                gate.name,
                f"{'at most' if gate.upper else 'at least'} {gate.bound:g}",
                number(gate.value),
                "passed" if gate.passed else "**missed**",
            ]
            for gate in proof.gates
        ]
        lines += ["## Gates", "", markdown_table(Table(["gate", "bound", "reached", "result"], rows)), ""]
    if proof.reload:
        passed = "passed" if proof.reload.get("passed") else "**missed**"
        difference = proof.reload.get("max_abs_diff")
        shown = "" if difference is None else f"; largest difference of an output: {difference:.3g}"
        # an exported graph is run from its files by its own runtime instead
        how = "Run by its own runtime" if "judged_by" in proof.reload else "Loaded again in a fresh process"
        lines += ["## Reload", "", f"{how}: {passed}{shown}.", ""]
    return lines


def _made(config: RunConfig, history: Sequence[Mapping[str, Any]]) -> list[str]:
    compares = config.command in ("distill", "evaluate")
    facts: dict[str, Any] = {
        "teacher" if compares else "model": config.teacher.model,
        "model" if config.command == "evaluate" else "student": config.student.model if compares else None,
        "method": config.method_name or None,
        "hyper-parameters": ", ".join(f"{key}={value}" for key, value in config.method_values.items()) or None,
        "data": config.data.source,
        "task": config.data.task,
        "benchmark": config.eval.benchmark,
    }
    if config.command == "distill":
        facts["steps"] = history[-1].get("step") if history else None
        facts["batch"] = config.train.batch_size * config.train.grad_accum
        facts["learning rate"] = config.train.lr
    facts["seed"] = config.runtime.seed
    lines = ["## How it was made", ""]
    lines += [f"- {name}: `{value}`" for name, value in facts.items() if value is not None]
    if config.command != "evaluate":  # an evaluation leaves no manifest
        lines += ["", "`kdtool.json` beside this file holds the whole configuration, the versions and the hashes;"]
        lines += [f"`kdtool {config.command} -c kdtool.json -o NEW` repeats the run."]
    return [*lines, ""]


def _plots(folder: Path, proof: Proof, history: Sequence[Mapping[str, Any]]) -> list[str]:
    if importlib.util.find_spec("matplotlib") is None:
        return ["## Plots", "", 'Plots need matplotlib: `pip install "kdtool[plots]"`.', ""]
    from kdtool.report import _plots as draw

    lines: list[str] = []
    for caption, path in draw.draw_all(folder, proof, history):
        lines += [f"![{caption}]({path.relative_to(folder).as_posix()})", ""]
    return ["## Plots", "", *lines] if lines else []


def write_report(
    folder: Path,
    proof: Proof,
    history: Sequence[Mapping[str, Any]],
    config: RunConfig,
    plots: bool = True,
    section: Sequence[str] = (),
) -> None:
    """Write `report.md`, and `plots/*.png` where matplotlib is installed.

    Args:
        folder: The result folder.
        proof: What was measured.
        history: Log lines of training: `step`, `loss`, `lr`, and `parts` (name to value); may be empty.
        config: The resolved configuration.
        plots: Draw loss, generated texts, quality against size, and reliability, as far as there is something to draw.
        section: Lines of a part of its own, after the gates.

    Raises:
        OutputProblem: the folder cannot be written.
    """
    student, teacher = proof.student, proof.teacher
    against = f" against `{teacher.name}`{_at(teacher)}" if teacher else ""
    lines = [f"# {config.command}: `{student.name}`{against}", "", markdown_table(table_of(proof)), ""]
    if any(math.isfinite(error) for error in student.errors.values()):
        lines += ["\u00b1 is one standard error over the test rows; differences within two of them may be chance.", ""]
    lines += [*_calibration(proof), *_gates(proof), *section]
    if plots:
        lines += _plots(folder, proof, history)
    lines += _made(config, history)
    write_text(folder / "report.md", "\n".join(lines))


def _at(side: Side) -> str:
    return f" at `{side.revision[:12]}`" if side.revision else ""
