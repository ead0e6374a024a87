"""A patched image model as a graph: the images have one size, so it has one length, and reads any number of them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import kdtool
from kdtool import patching
from kdtool.config import load_config
from kdtool.errors import UsageProblem
from kdtool.models import Loaded
from kdtool.patching.fixed import fix
from kdtool.pipelines import export
from kdtool.run import Run
from kdtool.runtime_onnx import load_onnx
from kdtool.saving import save_model
from tests import tiny
from tests.exporters.conftest import config_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIDE = 32
SETTINGS = {"leaf": 16, "near": 1, "block": 32, "chunk": 32}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A ViT of 65 tokens whose attention is approximated, and its graph."""
    root = tmp_path_factory.mktemp("patched-image")
    source = root / "model"
    tiny.vit(source, layers=1)
    config: Any = transformers.ViTConfig.from_pretrained(source, image_size=SIDE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForImageClassification.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    sites = patching.find_sites(model, lambda: model(pixel_values=pixels).logits.detach())
    call = sites[0].calls[0]
    state = fix("cluster", call.q[:1], call.k[:1], call.v[:1])
    patching.patch(model, [patching.Layer(sites[0].name, "cluster", SETTINGS, 0, 0, state)], "cluster")
    processor = transformers.AutoImageProcessor.from_pretrained(source)
    processor.size = {"height": SIDE, "width": SIDE}
    save_model(Loaded(model, processor, "x"), source, load_config("export").output)
    export(config_of(source, root / "out"))
    return source, root / "out"


def test_the_graph_gives_the_outputs_of_the_patched_model(made: tuple[Path, Path]) -> None:
    source, folder = made
    parity = json.loads((folder / "kdtool.json").read_text())["reload"]
    assert parity["passed"]
    assert parity["max_abs_diff"] < 1e-5
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["TopK"], "the tree is not in the graph"
    assert not kinds.keys() & {"NonZero", "Multinomial", "RandomNormal", "RandomUniform", "Unique"}
    shape = [dim.dim_value or dim.dim_param for dim in graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", 3, SIDE, SIDE]
    run = load_onnx(folder, "graph", Run(offline=True)).model
    exact = transformers.AutoModelForImageClassification.from_pretrained(source)
    patched = kdtool.load(source)
    for rows in (1, 3):
        pixels = torch.randn(rows, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(rows))
        with torch.no_grad():
            wanted, other = (model(pixel_values=pixels).logits for model in (patched, exact))
        np.testing.assert_allclose(run(pixel_values=pixels).logits, wanted, atol=1e-4)
        assert (wanted - other).abs().max() > 1e-3


def test_a_length_is_for_text(made: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="the images of a model have one size"):
        export(config_of(made[0], tmp_path / "out", "method.length=65"))
    assert not (tmp_path / "out").exists()
