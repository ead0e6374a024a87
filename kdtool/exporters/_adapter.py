"""The one place that touches torch's and transformers' young exporters.

Both log and warn a lot about things a user cannot act on; that is held back here.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from kdtool.errors import QualityProblem
from kdtool.exporters._base import graph_inputs
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.tasks._base import Batch


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back the exporters' warnings, logs and prints."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _for_graph(model: nn.Module) -> Iterator[None]:
    """Eval mode, no key-value cache among the outputs."""
    config: Any = model.config
    cache = getattr(config, "use_cache", None)
    if cache is not None:
        config.use_cache = False
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        if cache is not None:
            config.use_cache = cache


def shapes_of(batch: Batch, fixed: bool = False) -> dict[str, dict[int, Any]]:
    """Which dimensions vary: the batch, and the length of text and audio unless `fixed`; images keep their size."""
    return {
        name: {0: Dim.DYNAMIC} if fixed or name == "pixel_values" else {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
        for name in batch
    }


def write_onnx(loaded: Loaded, batch: Batch, path: Path, opset: int, engine: str, run: Run, fixed: bool = False) -> str:
    """Write a float32 graph with dynamic batch and length, and its weights beside it.

    Args:
        loaded: The model, in float32 on the CPU.
        batch: Inputs to trace with; at least two rows of at least two tokens, since torch takes 1 for fixed.
        path: The .onnx file; weights go to `<name>.data`.
        opset: ONNX operator set.
        engine: transformers (torch where that fails, which is said) or torch.
        run: Context.
        fixed: Keep the length of the batch.

    Returns:
        The engine that was used: transformers or torch.

    Raises:
        QualityProblem: neither can export this model.
    """
    inputs = graph_inputs(loaded, batch)
    failed = None
    if engine == "transformers":
        try:
            _transformers_onnx(loaded.model, inputs, path, opset, fixed)
        except Exception as error:  # noqa: BLE001 - tracing runs the model's own code, which may raise anything
            failed = _first_line(error)
            run.reporter.warn(f"transformers' exporter failed ({failed}); trying torch.onnx.export")
        else:
            return "transformers"
    try:
        _torch_onnx(loaded.model, inputs, path, opset, fixed)
    except Exception as error:  # noqa: BLE001 - as above
        why = f"torch: {_first_line(error)}" + (f"; transformers: {failed}" if failed else "")
        raise QualityProblem(f"'{loaded.ref}' cannot be exported to ONNX", why=why) from None
    return "torch"


def _transformers_onnx(model: nn.Module, inputs: Batch, path: Path, opset: int, fixed: bool) -> None:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    with quiet(), _for_graph(model):
        settings = OnnxConfig(dynamic_shapes=shapes_of(inputs, fixed), opset_version=opset)
        made = OnnxExporter().export(model, dict(inputs), settings)
        OnnxExporter.save_program(made.program, path)


class _LogitsOnly(nn.Module):
    """A model with its inputs in a fixed order and its logits as the only output."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = list(names)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


def _torch_onnx(model: nn.Module, inputs: Batch, path: Path, opset: int, fixed: bool) -> None:
    # with keyword inputs torch 2.13 fails on transformers' forward methods, which take any further keyword
    with quiet(), _for_graph(model):
        program: Any = torch.onnx.export(
            _LogitsOnly(model, list(inputs)).eval(),
            tuple(inputs.values()),
            dynamo=True,
            dynamic_shapes=(tuple(shapes_of(inputs, fixed).values()),),
            opset_version=opset,
            input_names=list(inputs),
            output_names=["logits"],
            verbose=False,
        )
        program.save(str(path), external_data=True)


def write_openvino(loaded: Loaded, batch: Batch, path: Path, half: bool) -> None:
    """Write OpenVINO IR: `path` (.xml) and its weights (.bin) beside it.

    Args:
        loaded: The model, in float32 on the CPU.
        batch: Inputs to trace with.
        path: The .xml file.
        half: Store weights in float16.

    Raises:
        QualityProblem: the model cannot be exported.
    """
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

    inputs = graph_inputs(loaded, batch)
    try:
        with quiet(), _for_graph(loaded.model):
            settings = OpenVINOConfig(dynamic_shapes=shapes_of(inputs), compress_to_fp16=half)
            made = OpenVINOExporter().export(loaded.model, dict(inputs), settings)
            OpenVINOExporter.save_program(made.program, path)
    except Exception as error:  # noqa: BLE001 - tracing runs the model's own code, which may raise anything
        raise QualityProblem(f"'{loaded.ref}' cannot be exported to OpenVINO", why=_first_line(error)) from None


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {(str(cause).strip() or 'no message').splitlines()[0][:200]}"
