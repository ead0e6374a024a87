"""The part of a report that says what became of each attention layer."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdtool.patching.choose import Choice
from kdtool.proof import Table
from kdtool.report._markdown import markdown_table


def attention_rows(choices: Sequence[Choice], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """One object for each attention module, for `--json` and the manifest."""
    rows = []
    for choice in choices:
        layer = choice.layer
        row: dict[str, Any] = {"number": choice.number, "name": layer.name, "method": layer.method}
        if layer.reason is None:
            row |= {"settings": layer.settings, "min_length": layer.min_length, "called": choice.called}
        else:
            row["reason"] = layer.reason
        if choice.trials:
            last = choice.trials[-1]
            row |= {"mean_error": choice.mean_error, "error": last.error, "speed": last.ratio}
            row["tried"] = [
                {"settings": one.settings, "error": one.error[max(lengths)], "speed": one.ratio[max(lengths)]}
                for one in choice.trials
            ]
        rows.append(row)
    return rows


def attention_section(
    folder: Path, choices: Sequence[Choice], lengths: Sequence[int], calls: Mapping[str, int], plots: bool
) -> list[str]:
    """Lines of report.md: the table of layers, how to read it, and the plot of error against speed.

    Args:
        folder: The result folder; the plot goes to `plots/attention.png`.
        choices: What became of each module.
        lengths: Lengths at which speed was asked for.
        calls: `approximate` and `total` calls of attention while the test rows were scored and timed.
        plots: Draw, where matplotlib is installed.

    Raises:
        OutputProblem: the plot cannot be written.
    """
    longest = max(lengths)
    header = ["layer", "module", "attention", "from keys", f"error at {longest}", "mean of values"]
    header += [f"speed at {length}" for length in lengths]
    rows = [_row(choice, lengths) for choice in choices]
    lines = ["## Attention", "", markdown_table(Table(header, rows)), ""]
    lines += [
        "Error: largest over the heads of the spectral norm of approximate minus exact outputs, relative to the exact",
        "ones, on pilot rows of real inputs; beside it the error of answering every query with the mean of the values.",
        "Speed: time of exact attention (SDPA) divided by the operator's. Shorter inputs are joined to these lengths.",
        "From keys: the break-even length, from which on the operator is faster and within the bound, or the one set.",
        "",
    ]
    left = [choice for choice in choices if choice.layer.reason is not None]
    lines += [f"- Layer {choice.number} is exact: {choice.layer.reason}." for choice in left]
    lines += [f"- Scoring and timing on the test rows: {calls['approximate']} of {calls['total']} calls approximate."]
    lines += (
        ["- In every layer said to be patched the operator was seen to run.", ""] if len(left) < len(rows) else [""]
    )
    drawn = any(choice.trials for choice in choices)
    if plots and drawn and importlib.util.find_spec("matplotlib") is not None:
        from kdtool.report._attention_plot import draw

        draw(folder / "plots" / "attention.png", choices, longest)
        lines += [f"![Error against speed at {longest} keys](plots/attention.png)", ""]
    return lines


def _row(choice: Choice, lengths: Sequence[int]) -> list[str]:
    layer = choice.layer
    settings = ", ".join(f"{key}={value}" for key, value in layer.settings.items())
    how = "exact" if layer.reason is not None else f"{layer.method} {settings}".strip()
    start = "-" if layer.reason is not None else str(layer.min_length)
    if not choice.trials:
        return [str(choice.number), layer.name, how, start, *["-"] * (2 + len(lengths))]
    last = choice.trials[-1]
    speeds = [f"{last.ratio[length]:.2f}x" if length in last.ratio else "-" for length in lengths]
    errors = [f"{last.error[max(lengths)]:.3f}", f"{choice.mean_error or 0.0:.3f}"]
    return [str(choice.number), layer.name, how, start, *errors, *speeds]
