"""Quantised models as graphs: weights stay whole numbers in the file, outputs are those of the model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdtool
from kdtool.config import load_config
from kdtool.errors import UsageProblem
from kdtool.pipelines import compress, export
from kdtool.run import Run
from kdtool.runtime_onnx import load_onnx
from tests import tiny
from tests.exporters.conftest import config_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

WIDTH = 160
"""Exporters compute what is made of smaller weights beforehand."""


def quantized(name: str, root: Path, monkeypatch: pytest.MonkeyPatch, *settings: str) -> Path:
    """A tiny model of one layer with weights in whole numbers, on disk."""
    monkeypatch.setattr(tiny, "WIDTH", WIDTH)
    getattr(tiny, name)(root / "whole", layers=1)
    values = {"teacher.model": str(root / "whole"), "method.name": "quantize", "output.folder": str(root / "model")}
    compress(load_config("compress", None, [*settings, "eval.reload=false", "output.plots=false"], values))
    return root / "model"


CASES = {
    "int8": ("bert", ("method.scheme=int8",), "INT8", WIDTH),
    "int4": ("llama", ("method.scheme=int4", "method.embeddings=int4"), "UINT8", WIDTH // 2),
}


@pytest.mark.parametrize(("name", "settings", "kind", "width"), CASES.values(), ids=CASES)
def test_the_graph_gives_the_outputs_and_keeps_whole_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, settings: tuple[str, ...], kind: str, width: int
) -> None:
    source = quantized(name, tmp_path, monkeypatch, *settings)
    export(config_of(source, tmp_path / "out"))
    parity = json.loads((tmp_path / "out/kdtool.json").read_text())["reload"]
    assert parity["passed"]
    assert parity["max_abs_diff"] < 1e-4
    held: Any = onnx.load(str(tmp_path / "out/model.onnx"), load_external_data=False).graph.initializer
    codes = [
        one
        for one in held
        if list(one.dims) == [WIDTH, width] and onnx.TensorProto.DataType.Name(one.data_type) == kind
    ]
    assert len(codes) >= 2
    assert not [one for one in held if one.data_type == onnx.TensorProto.FLOAT and np.prod(one.dims) >= WIDTH**2]
    before = (tmp_path / "whole/model.safetensors").stat().st_size
    assert (tmp_path / "out/model.onnx.data").stat().st_size < 0.4 * before
    run, model = load_onnx(tmp_path / "out", "graph", Run(offline=True)).model, kdtool.load(source)
    for rows, length in ((1, 5), (3, 12)):
        ids = torch.randint(4, 20, (rows, length), generator=torch.Generator().manual_seed(length))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            np.testing.assert_allclose(run(**given).logits, model(**given).logits, atol=1e-4)


def test_rounded_inputs_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = quantized("bert", tmp_path, monkeypatch, "method.scheme=int8-dynamic")
    with pytest.raises(UsageProblem, match="int8-dynamic weights") as caught:
        export(config_of(source, tmp_path / "out"))
    assert "method.precision=int8" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()
