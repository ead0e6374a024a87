"""Error against speed of the settings that were tried, one line for each layer."""

from collections.abc import Sequence
from pathlib import Path

from kdtool.patching.choose import Choice
from kdtool.report._plots import new_figure, save, tidy


def draw(path: Path, choices: Sequence[Choice], length: int) -> None:
    """Write the plot; a filled mark is the choice of a layer, and layers without one were left exact."""
    figure = new_figure(7.0, 4.2)
    axes = figure.subplots()
    for choice in choices:
        if not choice.trials:
            continue
        speeds = [one.ratio[length] for one in choice.trials]
        errors = [one.error[length] for one in choice.trials]
        (line,) = axes.plot(speeds, errors, marker="o", fillstyle="none", linewidth=1.0, label=f"layer {choice.number}")
        if choice.layer.reason is None:
            axes.plot(speeds[-1:], errors[-1:], marker="o", color=line.get_color())
    axes.set_xlabel(f"speed against exact attention at {length} keys")
    axes.set_ylabel("relative error of the worst head")
    axes.set_ylim(bottom=0.0)
    axes.set_title("Attention", loc="left", fontweight="bold")
    axes.legend(frameon=False, ncols=2, fontsize=7)
    tidy(axes)
    save(figure, path)
