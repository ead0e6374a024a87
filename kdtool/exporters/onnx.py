"""ONNX: a graph with varying batch and length that onnxruntime runs without torch.

Written by transformers' exporter, by torch's where that fails, or by optimum in an environment of its
own. The result is run by onnxruntime on inputs of several shapes and compared with the source; see
docs/commands/export.md for the bounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from kdtool.errors import QualityProblem, UsageProblem
from kdtool.exporters import _adapter, _graph, _optimum
from kdtool.exporters._base import ExportReport, check_weights, judge, save_parts, source_outputs
from kdtool.models import Loaded
from kdtool.patching.fixed import check_exportable
from kdtool.run import Run
from kdtool.runtime_onnx import GRAPH, OnnxModel, need
from kdtool.sections import RunConfig
from kdtool.tasks._base import Batch, Task


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of the export."""

    opset: Annotated[int, Field(ge=18, le=23)] = 18
    """ONNX operator set."""
    precision: Literal["float32", "float16", "int8"] = "float32"
    """Number format; int8 quantises weights per channel and activations as they come."""
    embeddings: bool = False
    """With int8, quantise the embeddings, too: a smaller file, a little less exact."""
    optimize: bool = True
    """Clean the graph up with onnxslim, if it is installed."""
    engine: Literal["transformers", "torch", "optimum"] = "transformers"
    """Who writes the graph; torch steps in where transformers fails."""
    optimum_python: str | None = None
    """With engine optimum, the Python of an environment that has optimum-onnx."""
    length: Annotated[int | None, Field(ge=64)] = None
    """Tokens that the graph of a model with patched attention reads; shorter inputs are padded to it."""


def export(
    loaded: Loaded, task: Task, probes: Sequence[Batch], folder: Path, config: RunConfig, run: Run
) -> ExportReport:
    """Write the graph, its weights, configuration and processor, and compare it with the source.

    Args:
        loaded: Model and processor, in float32 on the CPU.
        task: Its task.
        probes: Batches of several shapes to compare on; the first has several rows and is traced.
        folder: An empty folder.
        config: `method.*` holds the settings.
        run: Context.

    Raises:
        UsageProblem: a package is missing.
        QualityProblem: the model cannot be exported.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package)
    settings = Config(**config.method_values)
    if config.output.dtype != "keep":
        raise UsageProblem(
            f"output.dtype={config.output.dtype} does not apply to ONNX",
            hint="--set method.precision=float32|float16|int8",
        )
    if settings.embeddings and settings.precision != "int8":
        raise UsageProblem("method.embeddings applies to int8 only", hint="--set method.precision=int8")
    check_weights(loaded)
    fixed = check_exportable(loaded.model, loaded.ref)
    if fixed and settings.engine == "optimum":
        raise UsageProblem("engine optimum does not export patched attention", hint="--set method.engine=torch")
    expected = source_outputs(task, loaded.model, probes)
    path = folder / GRAPH
    facts = _write(loaded, task, probes[0], path, settings, run, fixed)
    save_parts(loaded, folder)
    found = source_outputs(task, OnnxModel(path, loaded.model.config), probes)
    parity = judge(expected, found, probes, settings.precision)
    facts |= _graph.signature(path)
    if fixed and (undetermined := _graph.undetermined(path)):
        raise QualityProblem(
            f"the graph of '{loaded.ref}' would not give the same answer twice", why=", ".join(undetermined)
        )
    return ExportReport(settings.precision, _graph.files_of(path), parity, facts, GRAPH, _use(facts, config))


def _write(
    loaded: Loaded, task: Task, batch: Batch, path: Path, settings: Config, run: Run, fixed: bool
) -> dict[str, Any]:
    """The graph in its final form, with `fixed` for one length only; returns how it came about."""
    if settings.engine == "optimum":
        _optimum.write(loaded, task, path, settings.opset, settings.optimum_python, run)
        engine = "optimum"
    else:
        # transformers' exporter takes the number of sequences in patched attention for fixed
        wanted = "torch" if fixed else settings.engine
        engine = _adapter.write_onnx(loaded, batch, path, settings.opset, wanted, run, fixed)
    run.reporter.info(f"graph written by {engine}")
    facts: dict[str, Any] = {"engine": engine, "onnxslim": None}
    if settings.optimize:
        facts["onnxslim"] = _graph.slim(path)
        if facts["onnxslim"] is None:
            run.reporter.info("onnxslim is not installed: the graph is not cleaned up")
    if settings.precision == "int8":
        facts["int8_nodes"] = _graph.to_int8(path, settings.embeddings)
        if not facts["int8_nodes"]:
            run.reporter.warn("no matrix product could be quantised: the weights stay in float32")
    elif settings.precision == "float16":
        _graph.to_float16(path)
    _graph.tidy(path)
    return facts


def _use(facts: dict[str, Any], config: RunConfig) -> list[str]:
    """The card's section on loading: onnxruntime alone."""
    rows = [
        f"| {role} | `{value['name']}` | {value['type']} | {' x '.join(map(str, value['shape']))} |"
        for role in ("inputs", "outputs")
        for value in facts[role]
    ]
    where = config.output.push or config.output.folder
    return [
        "onnxruntime runs it, without torch and without kdtool:",
        "",
        "```python",
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession("{where}/{GRAPH}")',
        'logits = session.run(["logits"], inputs)[0]  # inputs: name to numpy array, as the processor makes them',
        "```",
        "",
        f"Keep `{GRAPH}.data`, the weights, beside `{GRAPH}`.",
        "",
        "| | name | type | shape |",
        "| --- | --- | --- | --- |",
        *rows,
    ]
