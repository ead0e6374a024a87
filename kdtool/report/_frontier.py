"""The frontier of a search: what outputs change for what is left, as a table and a plot."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdtool.proof import Table, amount
from kdtool.report._markdown import markdown_table


def frontier(points: Sequence[Any]) -> list[Any]:
    """Candidates that no other one beats in both what is left and how little the outputs change; the largest first."""
    best: list[Any] = []
    for point in sorted(points, key=lambda p: (p.share, p.divergence)):
        if not best or point.divergence < best[-1].divergence:
            best.append(point)
    return best[::-1]


def frontier_section(folder: Path, points: Sequence[Any], budget: str, plots: bool) -> list[str]:
    """The search as a section of the report; draws `plots/frontier.png` where matplotlib is installed.

    Args:
        folder: The result folder.
        points: Candidates, each with `settings`, `parameters`, `bytes`, `share`, `divergence`, `taken`.
        budget: As asked, such as `parameters=0.5`.
        plots: Whether to draw.
    """
    quantity = budget.partition("=")[0]
    rows = [
        [_settings(p.settings), amount(p.parameters), amount(p.bytes, "B"), f"{100 * p.share:.1f} %",
         f"{p.divergence:.4g}", "yes" if p.taken else ""]
        for p in frontier(points)
    ]  # fmt: skip
    header = ["setting", "parameters", "bytes", f"{quantity} left", "change of the outputs (nats)", "on the way"]
    lines = [
        f"## Search for {budget}",
        "",
        f"{len(points)} settings were tried on calibration rows, without training. Of those below, none is beaten by",
        "another one in both what it leaves and what it changes. The last one on the way is the result.",
        "",
        markdown_table(Table(header, rows)),
        "",
    ]
    if plots and importlib.util.find_spec("matplotlib") is not None:
        _draw(folder / "plots" / "frontier.png", points, budget)
        lines += ["![Change of the outputs against what is left](plots/frontier.png)", ""]
    return lines


def _settings(settings: Mapping[str, Mapping[str, Any]]) -> str:
    return "; ".join(
        f"{name} " + ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
        for name, values in settings.items()
    )


def _draw(path: Path, points: Sequence[Any], budget: str) -> None:
    from kdtool.report import _plots

    quantity, _, share = budget.partition("=")
    figure = _plots.new_figure(6.0, 4.0)
    axes = figure.subplots()
    others = [p for p in points if not p.taken]
    taken = sorted((p for p in points if p.taken), key=lambda p: -p.share)
    axes.plot([100 * p.share for p in others], [p.divergence for p in others], "o", color="#8a8a8a", label="tried")
    axes.plot([100 * p.share for p in taken], [p.divergence for p in taken], "o-", color=_plots.STUDENT, label="taken")
    axes.axvline(100 * float(share), color=_plots.TEACHER, linestyle="--", linewidth=1.0, label="budget")
    axes.set_xlabel(f"{quantity} left (%)")
    axes.set_ylabel("change of the outputs (nats)")
    axes.set_title("What the search found", loc="left", fontweight="bold")
    axes.legend(frameon=False)
    _plots.tidy(axes)
    _plots.save(figure, path)
