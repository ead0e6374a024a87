"""Changes to an ONNX file on disk: names of dimensions, float16, int8, clean-up."""

import importlib.metadata
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdtool.exporters._adapter import quiet
from kdtool.runtime_onnx import need


def files_of(path: Path) -> list[str]:
    """The graph's file and that of its weights."""
    return sorted(found.name for found in path.parent.glob(f"{path.name}*"))


def tidy(path: Path) -> None:
    """Call the varying dimensions `batch` and `length` instead of s72 and s53, and drop notes of the exporter.

    The first dimension of an input is the batch, a second varying one the length. Shapes of values
    inside the graph are dropped: runtimes work them out, and they would name dimensions as before.
    So are the notes on each node: they hold source lines with paths of this machine, and outweigh
    the graph of a small model.
    """
    onnx = need("onnx")
    model = onnx.load(str(path), load_external_data=False)
    names: dict[str, str] = {}
    for value in model.graph.input:
        for place, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                names[dim.dim_param] = "length" if place else "batch"
                dim.dim_param = names[dim.dim_param]
    for value in model.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:  # to set it otherwise would erase a fixed size
                dim.dim_param = names[dim.dim_param]
    del model.graph.value_info[:]
    for node in _nodes(model):
        del node.metadata_props[:]
        node.doc_string = ""
    for owner in (model, model.graph, *model.functions):
        del owner.metadata_props[:]
        owner.doc_string = ""
    onnx.save(model, str(path))


_UNDETERMINED = {"Multinomial", "NonZero", "Bernoulli", "Unique"}


def undetermined(path: Path) -> list[str]:
    """Operators of a graph that draw, or whose shapes depend on values; kinds, in alphabetical order."""
    onnx = need("onnx")
    kinds = {node.op_type for node in _nodes(onnx.load(str(path), load_external_data=False))}
    return sorted(kind for kind in kinds if kind in _UNDETERMINED or kind.startswith("Random"))


def _nodes(model: Any) -> Iterator[Any]:
    """All nodes, also those of functions and of branches and loops."""
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            waiting.extend(attribute.g.node)
            waiting.extend(inner for graph in attribute.graphs for inner in graph.node)


def signature(path: Path) -> dict[str, Any]:
    """Inputs and outputs with type and shape, for the manifest; the operator set."""
    onnx = need("onnx")
    model = onnx.load(str(path), load_external_data=False)

    def described(value: Any) -> dict[str, Any]:
        kind = value.type.tensor_type
        shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
        return {"name": value.name, "type": onnx.TensorProto.DataType.Name(kind.elem_type).lower(), "shape": shape}

    held = {tensor.name for tensor in model.graph.initializer}
    return {
        "inputs": [described(value) for value in model.graph.input if value.name not in held],
        "outputs": [described(value) for value in model.graph.output],
        "opset": next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        "nodes": len(model.graph.node),
    }


def to_int8(path: Path, embeddings: bool) -> int:
    """Weights of matrix products (and embeddings) in int8, activations quantised as they come.

    Always per channel: per tensor, MiniLM's worst sentence fell from a cosine of 0.98 to 0.92.

    Returns:
        Number of matrix products and embeddings that now work on int8.
    """
    quantization = need("onnxruntime.quantization")
    kinds = ["MatMul", "Gemm"] + (["Gather"] if embeddings else [])
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, quiet():
        made = Path(scratch) / path.name
        quantization.quantize_dynamic(
            str(path),
            str(made),
            op_types_to_quantize=kinds,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            use_external_data_format=True,
        )
        _replace(path, made.parent)
    onnx = need("onnx")
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    return sum(node.op_type in ("MatMulInteger", "DequantizeLinear") for node in nodes)


def to_float16(path: Path) -> None:
    """Weights and computation in float16; inputs and outputs keep their types."""
    onnx = need("onnx")
    float16 = need("onnxruntime.transformers.float16")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, quiet():
        model = float16.convert_float_to_float16(onnx.load(str(path)), keep_io_types=True, disable_shape_infer=False)
        _save(model, Path(scratch) / path.name)
        _replace(path, Path(scratch))


def slim(path: Path) -> str | None:
    """Clean the graph up with onnxslim.

    Returns:
        Its version; None if it is not installed, and nothing was done.
    """
    try:
        import onnxslim
    except ImportError:
        return None
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, quiet():
        _save(onnxslim.slim(str(path)), Path(scratch) / path.name)
        _replace(path, Path(scratch))
    return importlib.metadata.version("onnxslim")


def _save(model: Any, path: Path) -> None:
    need("onnx").save(
        model, str(path), save_as_external_data=True, all_tensors_to_one_file=True, location=f"{path.name}.data"
    )


def _replace(path: Path, folder: Path) -> None:
    """Put the graph of `folder`, with its weights, in the place of another."""
    for old in path.parent.glob(f"{path.name}*"):
        old.unlink()
    for made in folder.glob(f"{path.name}*"):
        shutil.move(str(made), path.parent / made.name)
