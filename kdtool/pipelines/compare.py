"""`compare`: several methods, or settings of one, with the same teacher, student, data, budget and seeds; one table."""

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdtool.errors import UsageProblem
from kdtool.gates import higher_is_better
from kdtool.pipelines.distill import distill
from kdtool.pipelines.output import MANIFEST, fingerprint
from kdtool.pipelines.setup import make_run
from kdtool.proof import Result, Table, number
from kdtool.report import draw_comparison, markdown_table
from kdtool.run import Run
from kdtool.sections import RunConfig
from kdtool.variants import variants_of
from kdtool.writing import write_text


def compare(config: RunConfig, run: Run | None = None) -> Result:
    """Distil once for every method and seed, and set the results side by side.

    Runs that are finished are taken as they are, so the same command goes on where it stopped.
    Size, latency and reload are measured for the first seed only: they do not depend on it.

    Args:
        config: As for `distill`; `method.name` may hold several names, see `kdtool.variants`, `eval.seeds` the seeds.
        run: Context (default: made from the configuration, silent).

    Raises:
        KdtoolError: as `distill`.
    """
    began = time.perf_counter()
    run = run or make_run(config)
    seeds = config.eval.seeds
    if config.output.folder is None:
        raise UsageProblem("no output folder given", hint="add -o FOLDER")
    root = Path(config.output.folder).expanduser()
    variants = variants_of(config)
    found: dict[str, list[dict[str, Any]]] = {}
    total, done = len(variants) * len(seeds), 0
    for position, seed in enumerate(seeds):
        for variant in variants:
            done += 1
            one = config.model_copy(deep=True)
            one.command = "distill"
            one.output.push = None  # many runs, one repository: the best is published by hand
            one.method = dict(variant.method)
            one.runtime.seed = seed
            one.output.folder = str(root / "runs" / f"{variant.folder}-seed{seed}")
            one.eval.latency = config.eval.latency and position == 0
            one.eval.reload = config.eval.reload and position == 0
            run.reporter.info(f"run {done} of {total}: {variant.name}, seed {seed}")
            found.setdefault(variant.name, []).append(
                _one(one, replace(run, seed=seed, provenance=dict(run.provenance)))
            )
    table, summary = summarise(found)
    _write(root, config, table, summary, seeds, run)
    extra = {"methods": summary, "seeds": list(seeds), "comparison": [table.header, *table.rows]}
    best = next(variant for variant in variants if variant.name == _best(summary))
    extra["next"] = f"kdtool evaluate {root / 'runs' / best.folder}-seed{seeds[0]} --data {config.data.source}"
    return Result("compare", root, None, time.perf_counter() - began, None, extra)


def _one(config: RunConfig, run: Run) -> dict[str, Any]:
    """The manifest of a run, done now or before."""
    folder = Path(str(config.output.folder))
    manifest = folder / MANIFEST
    mark = folder / "comparison.txt"
    asked = fingerprint(config)
    if manifest.is_file() and mark.is_file() and mark.read_text(encoding="utf-8") == asked:
        run.reporter.info("done before")
    else:
        config.output.overwrite = config.output.overwrite or not manifest.is_file()
        distill(config, run)
        write_text(mark, asked)
    values: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
    return values


def summarise(found: dict[str, list[dict[str, Any]]]) -> tuple[Table, dict[str, Any]]:
    """Mean and standard deviation over seeds for each method or variant of one, with the teacher in front."""
    metrics = list(next(iter(found.values()))[0]["metrics"]["student"])
    header = ["method", *metrics, "ms/step vs first", "latency"]
    rows: list[list[str]] = []
    summary: dict[str, Any] = {}
    first_time = _per_step(next(iter(found.values())))
    teacher = next(iter(found.values()))[0]["metrics"].get("teacher")
    if teacher:
        rows.append(["(teacher)", *(number(teacher.get(name)) for name in metrics), "-", "-"])
    for method, manifests in found.items():
        values = {name: [m["metrics"]["student"][name] for m in manifests] for name in metrics}
        spread = {name: statistics.stdev(v) if len(v) > 1 else math.nan for name, v in values.items()}
        ratio = _per_step(manifests) / first_time
        summary[method] = {
            "mean": {name: statistics.fmean(v) for name, v in values.items()},
            "stdev": {name: None if math.isnan(s) else s for name, s in spread.items()},
            "values": values,
            "step_time_ratio": ratio,
            "parameters": manifests[0]["models"]["student"]["parameters"],
            "bytes": manifests[0]["models"]["student"]["bytes"],
        }
        latency = (manifests[0].get("latency") or {}).get("student") or {}
        shown = next((f"{entry['median_ms']:.2f} ms" for entry in latency.values()), "-")
        cells = [number(summary[method]["mean"][name], spread[name]) for name in metrics]
        rows.append([method, *cells, f"{ratio:.2f}", shown])
    return Table(header, rows), summary


def _per_step(manifests: Sequence[dict[str, Any]]) -> float:
    """Median over seeds of the training time of a step, in seconds."""
    return float(statistics.median(m["train_seconds"] / m["steps"] for m in manifests))


def _best(summary: dict[str, Any]) -> str:
    """Method with the best mean of the main metric."""
    metric = next(iter(next(iter(summary.values()))["mean"]))
    sign = 1 if higher_is_better(metric) else -1
    return max(summary, key=lambda name: sign * summary[name]["mean"][metric])


def _write(
    root: Path, config: RunConfig, table: Table, summary: dict[str, Any], seeds: Sequence[int], run: Run
) -> None:
    """comparison.md, comparison.json and a plot."""
    lines = [
        f"# Methods compared: `{config.teacher.model}` to `{config.student.model}` on `{config.data.source}`",
        "",
        f"Seeds {', '.join(map(str, seeds))}; mean \u00b1 standard deviation over seeds. Every method had the same",
        "teacher, student, data, steps and learning rate. `ms/step vs first` is the training time of a step",
        "relative to the first method.",
        "",
        markdown_table(table),
        "",
    ]
    command = run.provenance.get("command")
    if command:
        lines += ["```bash", str(command), "```", ""]
    if config.output.plots:
        picture = draw_comparison(root, summary)
        if picture is not None:
            lines += [f"![methods compared]({picture.name})", ""]
    write_text(root / "comparison.md", "\n".join(lines))
    write_text(root / "comparison.json", json.dumps({"seeds": list(seeds), "methods": summary}, indent=2) + "\n")
