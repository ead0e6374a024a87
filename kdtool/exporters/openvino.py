"""OpenVINO IR: a graph with varying batch and length for OpenVINO's runtime.

Compared with the source in float32. On processors that have it, OpenVINO computes in bfloat16 unless
told otherwise, with much larger differences: what that default gives is measured and reported, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdtool.errors import UsageProblem
from kdtool.exporters import _adapter
from kdtool.exporters._base import ExportReport, check_weights, graph_inputs, judge, save_parts, source_outputs
from kdtool.models import Loaded
from kdtool.patching.fixed import patched_layers
from kdtool.run import Run
from kdtool.runtime_onnx import need
from kdtool.sections import RunConfig
from kdtool.tasks._base import Batch, Task

GRAPH = "openvino_model.xml"


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of the export."""

    precision: Literal["float32", "float16"] = "float32"
    """Number format of the stored weights."""


class _Compiled(nn.Module):
    """A compiled model with the face of a transformers model."""

    def __init__(self, compiled: Any, loaded: Loaded) -> None:
        super().__init__()
        self.compiled = compiled
        self.loaded = loaded
        self.names = {port.get_any_name() for port in compiled.inputs}

    def forward(self, **inputs: Any) -> SimpleNamespace:
        """Run it; returns an object with `logits`."""
        batch = graph_inputs(self.loaded, {k: v for k, v in inputs.items() if isinstance(v, Tensor)})
        found = self.compiled({name: value.numpy() for name, value in batch.items() if name in self.names})
        return SimpleNamespace(logits=torch.from_numpy(found["logits"].copy()))


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
        UsageProblem: OpenVINO is missing.
        QualityProblem: the model cannot be exported.
    """
    openvino = need("openvino")
    settings = Config(**config.method_values)
    check_weights(loaded)
    if patched_layers(loaded.model):
        raise UsageProblem(f"the patched attention of '{loaded.ref}' is not exported to OpenVINO", hint="--format onnx")
    if config.output.dtype != "keep":
        raise UsageProblem(
            f"output.dtype={config.output.dtype} does not apply to OpenVINO",
            hint="--set method.precision=float32|float16",
        )
    expected = source_outputs(task, loaded.model, probes)
    path = folder / GRAPH
    _adapter.write_openvino(loaded, probes[0], path, settings.precision == "float16")
    save_parts(loaded, folder)
    core = openvino.Core()
    graph = core.read_model(str(path))
    exact = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    parity = judge(expected, source_outputs(task, _Compiled(exact, loaded), probes), probes, settings.precision)
    default = core.compile_model(graph, "CPU")
    chosen = str(default.get_property("INFERENCE_PRECISION_HINT").to_string())
    usual = judge(expected, source_outputs(task, _Compiled(default, loaded), probes), probes, settings.precision)
    parity |= {"default_precision": chosen, "default_max_abs_diff": usual["max_abs_diff"]}
    if chosen != "f32":
        run.reporter.warn(
            f"OpenVINO computes in {chosen} on this processor unless told otherwise: "
            f"largest difference {usual['max_abs_diff']:.2e} instead of {parity['max_abs_diff']:.2e}"
        )
    facts = {
        "engine": "transformers",
        "openvino": str(openvino.__version__),
        "inputs": [{"name": p.get_any_name(), "shape": str(p.partial_shape)} for p in graph.inputs],
        "outputs": [{"name": p.get_any_name(), "shape": str(p.partial_shape)} for p in graph.outputs],
    }
    names = sorted(found.name for found in folder.glob("openvino_model.*"))
    return ExportReport(settings.precision, names, parity, facts, GRAPH, _use(config), scored=False)


def _use(config: RunConfig) -> list[str]:
    """The card's section on loading."""
    where = config.output.push or config.output.folder
    return [
        "OpenVINO runs it, without torch and without kdtool:",
        "",
        "```python",
        "import openvino",
        "",
        'exact = {"INFERENCE_PRECISION_HINT": "f32"}  # without it: bfloat16 where the processor has it',
        f'model = openvino.Core().compile_model("{where}/{GRAPH}", "CPU", exact)',
        'logits = model(inputs)["logits"]  # inputs: name to numpy array, as the processor makes them',
        "```",
    ]
