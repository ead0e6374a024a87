"""One plot for a comparison of methods: every seed a point, the mean a bar."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PICTURE = "comparison.png"


def draw_comparison(folder: Path, summary: Mapping[str, Any]) -> Path | None:
    """Draw the main metric of every method over its seeds.

    Args:
        folder: Where `comparison.png` goes.
        summary: Method to `mean` and `values`, each by metric; the first metric is drawn.

    Returns:
        The picture, or None without matplotlib.
    """
    try:
        from kdtool.report import _plots as draw
    except ImportError:
        return None
    metric = next(iter(next(iter(summary.values()))["mean"]))
    figure = draw.new_figure(7.0, 0.45 * len(summary) + 1.2)
    axes = figure.subplots()
    for place, values in enumerate(summary.values()):
        points = values["values"][metric]
        axes.plot(points, [place] * len(points), "o", color=draw.STUDENT, alpha=0.6)
        axes.plot([values["mean"][metric]] * 2, [place - 0.3, place + 0.3], color=draw.TEACHER, linewidth=2.5)
    axes.set_yticks(range(len(summary)), list(summary))
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric}: each seed, and the mean")
    draw.tidy(axes, "x")
    draw.save(figure, folder / PICTURE)
    return folder / PICTURE
