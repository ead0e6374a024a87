"""Models with patched attention as ONNX graphs: one length, fixed projections, nothing drawn."""

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
from kdtool.errors import ModelProblem, UsageProblem
from kdtool.models import Loaded
from kdtool.patching.fixed import fix
from kdtool.pipelines import evaluate, export
from kdtool.run import Run
from kdtool.runtime_onnx import load_onnx
from kdtool.saving import save_model
from tests import tiny
from tests.exporters.conftest import config_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

LENGTH = 64
SETTINGS = {
    "cluster": {"leaf": 16, "near": 1, "block": 32, "chunk": 32},
    "kdeformer": {"bucket": 16, "samples": 16},
}


def patched(folder: Path, method: str = "cluster", fixed: bool = True) -> Path:
    """A tiny model of one layer whose attention is approximated, on disk."""
    tiny.save_bert_tokenizer(folder)
    config = tiny.bert_config(1)
    config.max_position_embeddings = 128
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(4, 20, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    sites = patching.find_sites(model, lambda: model(input_ids=ids).logits.detach())
    call = sites[0].calls[0]
    state = fix(method, call.q[:1], call.k[:1], call.v[:1]) if fixed else None
    layer = patching.Layer(sites[0].name, method, SETTINGS[method], 0, 0, state)
    patching.patch(model, [layer], method)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 128
    save_model(Loaded(model, tokenizer, "x"), folder, load_config("export").output)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The patched model and its graph."""
    root = tmp_path_factory.mktemp("patched")
    source = patched(root / "model")
    export(config_of(source, root / "out", f"method.length={LENGTH}"))
    return source, root / "out"


def test_the_graph_gives_the_outputs_of_the_patched_model(made: tuple[Path, Path]) -> None:
    source, folder = made
    manifest = json.loads((folder / "kdtool.json").read_text())
    parity = manifest["reload"]
    assert parity["passed"]
    assert parity["max_abs_diff"] < 1e-5
    assert [shape["input_ids"] for shape in parity["shapes"]] == [[3, LENGTH], [1, LENGTH], [2, LENGTH]]
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["TopK"], "the tree is not in the graph"
    assert not kinds.keys() & {"NonZero", "Multinomial", "RandomNormal", "RandomUniform", "Unique"}
    assert [dim.dim_value or dim.dim_param for dim in graph.input[0].type.tensor_type.shape.dim] == ["batch", LENGTH]
    # on inputs of its own, and beside the exact model, which it must not be
    ids = torch.randint(4, 20, (5, LENGTH), generator=torch.Generator().manual_seed(7))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    run = load_onnx(folder, "graph", Run(offline=True)).model
    with torch.no_grad():
        wanted = kdtool.load(source)(**given).logits
        exact = transformers.AutoModelForSequenceClassification.from_pretrained(source)(**given).logits
    np.testing.assert_allclose(run(**given).logits, wanted, atol=1e-4)
    assert (wanted - exact).abs().max() > 1e-3
    short = {key: value[:, :40] for key, value in given.items()}
    padded = {key: torch.nn.functional.pad(value, (0, LENGTH - 40)) for key, value in short.items()}
    assert run(**short).logits.equal(run(**padded).logits)
    with pytest.raises(ModelProblem, match=f"reads {LENGTH} tokens"):
        run(input_ids=torch.ones(1, LENGTH + 1, dtype=torch.long))


def test_a_graph_of_one_length_is_scored(made: tuple[Path, Path], data: Any) -> None:
    source, folder = made
    values = {"student.model": str(folder), "teacher.model": str(source), "data.source": str(data("text"))}
    result = evaluate(load_config("evaluate", None, [f"data.max_length={LENGTH}", "eval.latency=false"], values))
    assert result.proof is not None
    assert set(result.proof.student.metrics) == set(result.proof.teacher.metrics)  # type: ignore[union-attr]


REFUSED = {
    "no length": ({}, (), "onnx", "needs one length"),
    "too long": ({}, ("method.length=129",), "onnx", "at most 128 tokens"),
    "not fixed": ({"fixed": False}, (f"method.length={LENGTH}",), "onnx", "cannot be exported"),
    "drawn": ({"method": "kdeformer", "fixed": False}, (), "onnx", "the attention kdeformer"),
    "openvino": ({}, (), "openvino", "not exported to OpenVINO"),
}


@pytest.mark.parametrize(("values", "settings", "fmt", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_exported_is_refused_in_one_line(
    tmp_path: Path, values: dict[str, Any], settings: tuple[str, ...], fmt: str, said: str
) -> None:
    if fmt == "openvino":
        pytest.importorskip("openvino")
    source = patched(tmp_path / "model", **values)
    with pytest.raises(UsageProblem, match=said) as caught:
        export(config_of(source, tmp_path / "out", *settings, fmt=fmt))
    if values:
        assert "--method cluster" in caught.value.hint or "patch.fixed=true" in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert json.loads((source / "config.json").read_text())["kde_attention"]


def test_a_length_is_for_patched_attention_only(tmp_path: Path, models: Any) -> None:
    with pytest.raises(UsageProblem, match="patched attention"):
        export(config_of(models("bert-small"), tmp_path / "out", f"method.length={LENGTH}"))
