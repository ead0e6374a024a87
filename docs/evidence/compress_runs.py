"""The runs behind compress.md: MiniLM on TREC at 50 % and 25 % of its parameters, with and without recovery.

Finished runs are kept as JSON in --folder and not repeated. At the end the table is printed, and with --plot
the frontier is drawn. --wid names runs of weight-inherited distillation as wid.md makes them, without -0, -1, -2.

    OMP_NUM_THREADS=1 python docs/evidence/compress_runs.py --folder runs/compress --plot docs/evidence/compress.png \
        --wid runs/wid-trec,runs/wid-quarter
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from kdtool.config import load_config
from kdtool.errors import KdtoolError
from kdtool.pipelines.compress import compress

MODEL, DATA = "../shared/data/models/minilm-l6-trec", "../shared/data/text/trec"
BUDGETS = [
    ("width", 0.5), ("layers", 0.5), ("low-rank", 0.5), ("width", 0.25), ("vocab,layers", 0.25),
    ("vocab,low-rank", 0.25), ("layers", 0.25), ("low-rank", 0.25),
]  # fmt: skip
CHOICE = {"layers": ["method.choose=change"], "vocab,layers": ["method.layers.choose=change"]}
WHOLE = {
    "quantize int8": ("quantize", []),
    "quantize int8-dynamic": ("quantize", ["method.scheme=int8-dynamic"]),
    "quantize int4": ("quantize", ["method.scheme=int4"]),
    "quantize int4, embeddings too": ("quantize", ["method.scheme=int4", "method.embeddings=int4"]),
    "vocab": ("vocab", []),
}
STEPS, SEEDS = 100, (0, 1, 2)
COMMON = ["runtime.threads=1", "eval.latency_repeats=8", "output.plots=false", "train.batch_size=16"]


def run(folder: Path, name: str, method: str, settings: list[str], **options: Any) -> dict[str, Any]:
    """One run of `kdtool compress`, or what is kept of it."""
    kept = folder / f"{name}.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    values = {"teacher.model": MODEL, "data.source": DATA, "method.name": method, "runtime.offline": True}
    values |= {"output.folder": str(folder / f"model {name}"), "output.overwrite": True, **options}
    try:
        answer = compress(load_config("compress", None, [*COMMON, *settings], values)).as_json()
    except KdtoolError as error:
        answer = {"error": error.message}
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(answer), encoding="utf-8")
    print(name, answer.get("error") or answer["metrics"]["student"]["accuracy"], flush=True)
    return answer


def recovered(folder: Path, method: str, share: float, found: dict[str, Any], seed: int) -> dict[str, Any]:
    """The settings that a search found, with recovery."""
    settings = []
    chosen = found["search"]["settings"]
    for stage, values in chosen.items():
        prefix = f"method.{stage}." if len(chosen) > 1 else "method."
        settings += [f"{prefix}{key}={value}" for key, value in values.items()]
    settings += ["eval.latency=false", "eval.reload=false"]
    options = {"recover.steps": STEPS, "runtime.seed": seed}
    return run(folder, f"{method} {share} seed {seed}", method, settings, **options)


def rows(folder: Path) -> list[dict[str, Any]]:
    """All runs, those that stand on a search once for each seed."""
    made = []
    for name, (method, settings) in WHOLE.items():
        made.append({"name": name, "share": 1.0, "before": run(folder, name, method, settings), "after": []})
    for method, share in BUDGETS:
        settings = ["search.notches=6", *CHOICE.get(method, [])]
        found = run(folder, f"{method} {share}", method, settings, **{"search.budget": f"parameters={share}"})
        after = [] if "error" in found else [recovered(folder, method, share, found, seed) for seed in SEEDS]
        made.append({"name": method, "share": share, "before": found, "after": after})
    return made


def table(made: list[dict[str, Any]]) -> str:
    """Accuracy before and after recovery, sizes and latency, as Markdown."""
    lines = [
        "| compressor | budget | parameters | file | accuracy | recovered, mean +- sd | faster, batch 1 | batch 32 |"
    ]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in made:
        before = row["before"]
        budget = f"{row['share']:.0%}" if row["share"] < 1 else "-"
        if "error" in before:
            lines.append(f"| `{row['name']}` | {budget} | not reached: {before['error']} | | | | | |")
            continue
        scores = [after["metrics"]["student"]["accuracy"] for after in row["after"] if "error" not in after]
        spread = f"{statistics.mean(scores):.3f} +- {statistics.stdev(scores):.3f}" if len(scores) > 1 else "-"
        accuracy, error = before["metrics"]["student"]["accuracy"], before["errors"]["student"]["accuracy"]
        ratio = before["latency"]["ratio"]
        lines.append(
            f"| `{row['name']}` | {budget} | {before['model']['parameters'] / 1e6:.2f} M "
            f"| {before['model']['bytes'] / 1e6:.1f} MB | {accuracy:.3f} +- {error:.3f} | {spread} "
            f"| {ratio['1']:.2f} | {ratio['32']:.2f} |"
        )
    return "\n".join(lines)


def inherited(names: list[str]) -> list[tuple[float, float, str]]:
    """Accuracy, megabytes and name of what `wid` gave: mean over the seeds, in float16 as the others are."""
    found = []
    for name in names:
        runs = [json.loads(Path(f"{name}-{seed}", "kdtool.json").read_text(encoding="utf-8")) for seed in SEEDS]
        scores = [run["metrics"]["student"]["accuracy"] for run in runs]
        size = 2 * runs[0]["models"]["student"]["parameters"] / 1e6
        print(f"| `wid`, {size:.1f} MB | {statistics.mean(scores):.3f} +- {statistics.stdev(scores):.3f} |")
        found.append((statistics.mean(scores), size, "wid"))
    return found


def draw(made: list[dict[str, Any]], path: Path, others: list[tuple[float, float, str]]) -> None:
    """Accuracy against file size, recovered where there was recovery."""
    from kdtool.report import _plots

    figure = _plots.new_figure(6.4, 4.2)
    axes = figure.subplots()
    labels = list(others)
    for top, size, _ in others:
        axes.plot(size, top, "o", color=_plots.STUDENT, markersize=6)
    for row in made:
        before = row["before"]
        if "error" in before:
            continue
        size, cut = before["model"]["bytes"] / 1e6, before["metrics"]["student"]["accuracy"]
        axes.plot(size, cut, "o", color=_plots.TEACHER, markersize=5)
        scores = [after["metrics"]["student"]["accuracy"] for after in row["after"] if "error" not in after]
        top = statistics.mean(scores) if scores else cut
        if scores:
            axes.plot([size, size], [cut, top], color="#c8c8c8", linewidth=1.0)
            axes.plot(size, top, "o", color=_plots.STUDENT, markersize=6)
        labels.append((top, size, row["name"].removeprefix("quantize ")))
    placed: list[tuple[float, float, float]] = []
    for top, size, name in sorted(labels, reverse=True):  # a label goes below those that it would cover
        end = size + 0.2 * len(name)
        height = top
        for first, last, y in placed:
            if first < end and size < last and abs(y - height) < 0.028:
                height = y - 0.028
        placed.append((size, end, height))
        axes.annotate(name, (size + 0.3, height), fontsize=7, verticalalignment="center")
    whole = next(row["before"]["teacher"] for row in made if "error" not in row["before"])
    axes.axvline(whole["bytes"] / 1e6, color="#8a8a8a", linestyle=":", linewidth=1.0)
    axes.set_xlabel("file size (MB); dotted: the model itself")
    axes.set_ylabel("accuracy (orange: as cut, blue: recovered)")
    _plots.tidy(axes)
    _plots.save(figure, path)


def main(arguments: list[str]) -> int:
    """Run what is missing, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--wid", default="")
    given = parser.parse_args(arguments)
    made = rows(given.folder)
    print(table(made))
    others = inherited(given.wid.split(",") if given.wid else [])
    if given.plot is not None:
        draw(made, given.plot, others)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
