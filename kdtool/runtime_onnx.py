"""ONNX folders as models: run by onnxruntime, scored and timed like any other model."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdtool.errors import ModelProblem, UsageProblem
from kdtool.models import Loaded, auto_class, load_model, plain_model_errors, read_config, resolve
from kdtool.run import Run

GRAPH = "model.onnx"
"""Name of the graph file; its weights lie beside it in `model.onnx.data`."""

EXTRA = {
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "onnxruntime.quantization": "onnx",
    "openvino": "openvino",
}
"""Package to the extra of kdtool that brings it."""

_FILL = {"attention_mask": torch.ones, "token_type_ids": torch.zeros}
"""What a graph input means that a batch leaves out: all tokens are real, all are of the first sentence."""

_FOREIGN = {"openvino_model.xml": "OpenVINO", "*.pte": "ExecuTorch", "*.onnx.failed": "failed ONNX"}


def need(package: str) -> Any:
    """Import an optional package.

    Raises:
        UsageProblem: it is not installed; the hint names the extra.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise UsageProblem(
            f"{name} is not installed", hint=f"pip install 'kdtool[{EXTRA.get(package, 'onnx')}]'"
        ) from None


class OnnxModel(nn.Module):
    """A graph with the face of a transformers model: `.config`, and `.logits` of what a call returns.

    Args:
        graph: The .onnx file.
        config: The model's transformers configuration.

    Raises:
        UsageProblem: onnxruntime is not installed.
        ModelProblem: the graph cannot be loaded or has no output `logits`.
    """

    def __init__(self, graph: Path, config: Any) -> None:
        super().__init__()
        self.config = config
        runtime = need("onnxruntime")
        options = runtime.SessionOptions()
        # as many threads as torch has, so that latencies of both can be compared
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = runtime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001 - onnxruntime raises its own classes, all derived from Exception
            first = str(error).strip().split("\n", 1)[0]
            raise ModelProblem(f"'{graph}' cannot be loaded by onnxruntime", why=first[:300]) from None
        self.wanted = {value.name: value.type for value in self.session.get_inputs()}
        shapes = {value.name: value.shape for value in self.session.get_inputs()}
        fixed = shapes.get("input_ids", [None, None])[1]
        self.length = fixed if isinstance(fixed, int) else None
        if "logits" not in {value.name for value in self.session.get_outputs()}:
            raise ModelProblem(f"'{graph}' has no output named logits")

    def forward(self, **inputs: Any) -> SimpleNamespace:
        """Run the graph; inputs it does not take are left out, masks it misses are filled in.

        Returns:
            An object with `logits` (float32).
        """
        given = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        first = next(iter(given.values()))
        feed = {}
        for name, kind in self.wanted.items():
            value = given.get(name)
            if value is None:
                if name not in _FILL:
                    raise ModelProblem(f"the graph wants the input '{name}', which this task does not make")
                value = _FILL[name](first.shape[:2], dtype=torch.int64)
            feed[name] = self._lengthened(value).detach().cpu().numpy().astype(_numpy_type(kind), copy=False)
        logits = self.session.run(["logits"], feed)[0]
        if self.length is not None and logits.ndim > 2:
            logits = logits[:, : first.shape[1]]
        return SimpleNamespace(logits=torch.from_numpy(logits.astype(np.float32, copy=False)).to(first.device))

    def _lengthened(self, value: Tensor) -> Tensor:
        """Padded with 0 to the length of the graph, where it has one."""
        if self.length is None or value.shape[1] == self.length:
            return value
        if value.shape[1] > self.length:
            raise ModelProblem(
                f"the graph reads {self.length} tokens, and an input has {value.shape[1]}",
                hint=f"--set data.max_length={self.length}",
            )
        return nn.functional.pad(value, (0, self.length - value.shape[1]))


def _numpy_type(kind: str) -> Any:
    inner = kind.removeprefix("tensor(").removesuffix(")")
    return {"float": np.float32, "double": np.float64, "bool": np.bool_}.get(inner) or np.dtype(inner)


def is_onnx(folder: Path) -> bool:
    """True if a folder holds a graph and no safetensors weights."""
    return (folder / GRAPH).is_file() and not any(folder.glob("*.safetensors"))


def load_for_scoring(text: str, auto: str, run: Run, what: str = "model") -> Loaded:
    """Load a model to be scored: one that transformers loads, or an ONNX folder.

    Args:
        text: Folder or `id[@revision]`.
        auto: Name of the Auto class for models that transformers loads.
        run: Context.
        what: Role for messages and provenance.

    Raises:
        ModelProblem, HubProblem, UsageProblem: it cannot be had.
    """
    folder, revision = resolve(text, run, what)
    if is_onnx(folder):
        return load_onnx(folder, text, run, revision)
    if not any(folder.glob("*.safetensors")):
        for pattern, name in _FOREIGN.items():
            if any(folder.glob(pattern)):
                raise ModelProblem(
                    f"'{text}' is a {name} export, which kdtool does not score",
                    hint="evaluate its source, or export it with --format onnx",
                )
    return load_model(text, auto, run, what)


def load_onnx(folder: Path, ref: str, run: Run, revision: str | None = None) -> Loaded:
    """An ONNX folder as a model; the parameter count comes from its manifest.

    Raises:
        UsageProblem: onnxruntime is not installed.
        ModelProblem: config.json or the graph is missing or damaged.
    """
    read_config(folder, ref)
    with plain_model_errors(ref):
        config = auto_class("AutoConfig").from_pretrained(
            folder, local_files_only=True, trust_remote_code=run.trust_remote_code
        )
    manifest = _manifest(folder)
    parameters = manifest.get("models", {}).get("student", {}).get("parameters", 0)
    model = OnnxModel(folder / GRAPH, config).eval()
    return Loaded(model, None, ref, revision, folder, {"dtype": manifest.get("dtype"), "parameters": parameters})


def _manifest(folder: Path) -> dict[str, Any]:
    """kdtool.json; empty for graphs that others exported."""
    try:
        values = json.loads((folder / "kdtool.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
