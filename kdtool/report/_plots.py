"""The plots of a report; drawn without pyplot, so that nothing global changes."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdtool.gates import higher_is_better
from kdtool.proof import Proof, Side, amount
from kdtool.writing import write_bytes

STUDENT, TEACHER = "#0b6e99", "#d9822b"
_PARTS = ("#7a9e3a", "#a05195", "#c9a227", "#5d6d7e", "#c0392b", "#2a9d8f")
_GREY = "#8a8a8a"


_TEXTS = {
    "acceptance": "accepted (share of tokens)",
    "teacher log-likelihood": "teacher's log-likelihood\n(nats per token)",
    "student texts": "student's texts (share of tokens)",
}
"""Parts of the log that describe generated texts and are no losses, with what their axes say."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Any, grid: str = "both") -> None:
    """Light grid, no frame."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis=grid, color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG that is the same on every run: without the version of the drawing software."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_bytes(path, buffer.getvalue())


def _series(history: Sequence[Mapping[str, Any]], key: str, part: str | None = None) -> tuple[list[float], list[float]]:
    """Steps and finite values of one quantity of the log."""
    steps, values = [], []
    for entry in history:
        value = entry.get(key) if part is None else (entry.get(key) or {}).get(part)
        if value is not None and math.isfinite(float(value)):
            steps.append(float(entry["step"]))
            values.append(float(value))
    return steps, values


def _parts_of(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the logged parts, in order of appearance."""
    return list(dict.fromkeys(name for entry in history for name in entry.get("parts") or {}))


def texts_figure(history: Sequence[Mapping[str, Any]]) -> Figure | None:
    """What generated texts were like over steps, a panel for each figure; None where none were logged twice."""
    series = {name: _series(history, "parts", name) for name in _TEXTS if name in _parts_of(history)}
    series = {name: found for name, found in series.items() if len(found[0]) > 1}
    if not series:
        return None
    figure = new_figure(7.0, 1.2 + 2.0 * len(series))
    panels = figure.subplots(len(series), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (name, (steps, values)) in zip(panels, series.items(), strict=True):
        panel.plot(steps, values, color=STUDENT, linewidth=1.6)
        panel.set_ylabel(_TEXTS[name])
        if name != "teacher log-likelihood":
            panel.set_ylim(0.0, 1.02)
        tidy(panel)
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    panels[0].set_title("Generated texts", loc="left", fontweight="bold")
    return figure


def loss_figure(history: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Loss with its parts over steps, the learning rate below; None with fewer than two points."""
    steps, losses = _series(history, "loss")
    if len(steps) < 2:
        return None
    rates = _series(history, "lr")
    figure = new_figure(7.0, 4.6 if rates[0] else 3.6)
    panels = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1)) if rates[0] else [figure.subplots()]
    top = panels[0]
    names = [name for name in _parts_of(history) if name not in _TEXTS]
    drawn = list(losses)
    for position, name in enumerate(names):
        x, y = _series(history, "parts", name)
        drawn += y
        if x:
            top.plot(x, y, color=_PARTS[position % len(_PARTS)], linewidth=1.1, label=name)
    top.plot(steps, losses, color=STUDENT, linewidth=2.0, label="loss")
    if min(drawn) > 0 and max(drawn) / min(drawn) > 50:
        top.set_yscale("log")
    top.set_ylabel("loss")
    if names:
        top.legend(frameon=False)
    if rates[0]:
        panels[1].plot(*rates, color=_GREY, linewidth=1.4)
        panels[1].set_ylim(bottom=0.0)
        panels[1].set_ylabel("learning rate")
        panels[1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for panel in panels:
        tidy(panel)
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    top.set_title("Training", loc="left", fontweight="bold")
    return figure


def quality_figure(proof: Proof) -> Figure | None:
    """The main metric against file size, student and teacher; None without a teacher to compare with."""
    student, teacher = proof.student, proof.teacher
    metric = next((name for name in student.metrics if teacher and name in teacher.metrics), None)
    if teacher is None or metric is None or min(student.bytes, teacher.bytes) <= 0:
        return None
    points = [(teacher, TEACHER, "teacher"), (student, STUDENT, "student")]
    if not all(math.isfinite(side.metrics[metric]) for side, _, _ in points):
        return None
    figure = new_figure(6.0, 4.0)
    axes = figure.subplots()
    for side, colour, role in points:
        value, error = side.metrics[metric], side.errors.get(metric, 0.0)
        error = error if math.isfinite(error) else 0.0
        axes.errorbar(side.bytes / 1e6, value, yerr=error or None, fmt="o", color=colour, markersize=9, capsize=4)
        label = f"{role}\n{amount(side.bytes, 'B')}, {amount(side.parameters)} parameters\n{metric} {value:.4f}"
        # Labels hang below their point and lean inwards, so that both stay inside and apart.
        inwards = "left" if (side is student) == (student.bytes <= teacher.bytes) else "right"
        where: dict[str, Any] = {
            "xytext": (8 if inwards == "left" else -8, -12),
            "textcoords": "offset points",
            "ha": inwards,
            "va": "top",
        }
        axes.annotate(label, (side.bytes / 1e6, value), fontsize=9, color=colour, **where)
    values = [side.metrics[metric] for side, _, _ in points]
    spread = max(
        abs(values[0] - values[1]), 0.02 * abs(values[0]), *(3 * s.errors.get(metric, 0.0) for s, _, _ in points)
    )
    axes.set_ylim(min(values) - 0.9 * spread, max(values) + 0.4 * spread)
    small, large = sorted((student.bytes / 1e6, teacher.bytes / 1e6))
    # Of nearly equal sizes the smaller one's label needs room on the right.
    axes.set_xlim(0.0, (1.15 if small < 0.6 * large else 1.7) * large)
    tidy(axes)
    axes.set_xlabel("file size (MB)")
    axes.set_ylabel(f"{metric} ({'higher' if higher_is_better(metric) else 'lower'} is better)")
    axes.set_title("Quality against size", loc="left", fontweight="bold")
    return figure


def _reliability_panel(top: Any, bottom: Any, side: Side, role: str, colour: str) -> None:
    bins = side.reliability or []
    width = 1.0 / len(bins)
    centres = [(position + 0.5) * width for position in range(len(bins))]
    filled = [(centre, *entry) for centre, entry in zip(centres, bins, strict=True) if entry[2]]
    top.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1.0, label="as right as it is sure")
    x = [centre for centre, *_ in filled]
    top.bar(x, [accuracy for _, _, accuracy, _ in filled], 0.92 * width, color=colour, alpha=0.85, label="accuracy")
    top.plot(
        [sure for _, sure, _, _ in filled],
        [accuracy for _, _, accuracy, _ in filled],
        "o",
        color="black",
        markersize=3.5,
        clip_on=False,
        label="mean confidence of the bin",
    )
    total = sum(count for *_, count in filled)
    error = sum(abs(sure - accuracy) * count for _, sure, accuracy, count in filled) / total
    top.set_title(f"{role} (ECE {error:.3f})", loc="left", fontweight="bold")
    top.set_xlim(0, 1)
    top.set_ylim(0, 1)
    bottom.bar(x, [100 * count / total for *_, count in filled], 0.92 * width, color=colour, alpha=0.5)
    bottom.set_xlabel("confidence")
    tidy(top)
    tidy(bottom, "y")


def reliability_figure(proof: Proof) -> Figure | None:
    """Accuracy against confidence, one column for each model; None without confidence bins."""
    sides = [(proof.teacher, "Teacher", TEACHER), (proof.student, "Student" if proof.teacher else "Model", STUDENT)]
    drawn = [entry for entry in sides if entry[0] and any(count for *_, count in entry[0].reliability or [])]
    if not drawn:
        return None
    figure = new_figure(4.2 * len(drawn) + 0.4, 5.0)
    panels = figure.subplots(2, len(drawn), sharex=True, sharey="row", height_ratios=(4, 1), squeeze=False)
    for column, (side, role, colour) in enumerate(drawn):
        assert side is not None
        _reliability_panel(panels[0][column], panels[1][column], side, role, colour)
    panels[0][0].set_ylabel("accuracy")
    # Below the panels: inside, bars may be anywhere.
    figure.legend(*panels[0][0].get_legend_handles_labels(), frameon=False, ncols=3, loc="outside lower center")
    panels[1][0].set_ylabel("rows (%)")
    return figure


def draw_all(folder: Path, proof: Proof, history: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Path]]:
    """Draw what there is to draw into `folder/plots`; yields caption and path of each file."""
    figures = {
        "loss": ("Loss over steps", loss_figure(history)),
        "texts": ("Generated texts over steps", texts_figure(history)),
        "quality_size": ("Quality against size", quality_figure(proof)),
        "reliability": ("Reliability: accuracy against confidence", reliability_figure(proof)),
    }
    for name, (caption, figure) in figures.items():
        if figure is not None:
            path = folder / "plots" / f"{name}.png"
            save(figure, path)
            yield caption, path
