import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from kdtool.config import load_config
from kdtool.errors import ConfigProblem, ModelProblem, QualityProblem, UsageProblem
from kdtool.exporters import _adapter, _graph, onnx
from kdtool.exporters._base import judge
from kdtool.pipelines import evaluate, export
from kdtool.report._manifest import hashes
from kdtool.run import Silent
from tests.exporters.conftest import Export, config_of

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

AUTO = {
    "bert-small": "AutoModelForSequenceClassification",
    "vit-one": "AutoModelForImageClassification",
    "wav2vec-small": "AutoModelForAudioClassification",
    "llama-one": "AutoModelForCausalLM",
}

ALONE = """
import sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx")
given = np.load(sys.argv[2])
for shape in range(int(sys.argv[4])):
    feed = {i.name: given[f"{shape}.{i.name}"] for i in session.get_inputs()}
    np.save(f"{sys.argv[3]}/{shape}.npy", session.run(["logits"], feed)[0])
loaded = [name for name in ("torch", "transformers", "kdtool") if name in sys.modules]
assert not loaded, loaded
"""


def inputs_of(name: str, rows: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * rows + length)
    mask = torch.ones(rows, length, dtype=torch.int64)
    if rows > 1:
        mask[0, length // 2 :] = 0
    if name.startswith("vit"):
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    if name.startswith("wav2vec"):
        waves = torch.randn(rows, 40 * length, generator=generator)
        return {"input_values": waves, "attention_mask": mask.repeat_interleave(40, 1).int()}
    ids = torch.randint(4, 20, (rows, length), generator=generator)
    if name.startswith("llama"):
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


@pytest.mark.parametrize("name", AUTO)
def test_onnxruntime_alone_gives_the_outputs_of_torch_for_any_shape(
    name: str, exported: Export, models: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = exported(name).output
    model = getattr(transformers, AUTO[name]).from_pretrained(models(name)).eval()
    batches = [inputs_of(name, rows, length) for rows, length in ((1, 12), (1, 5), (3, 12), (5, 20))]
    np.savez(tmp_path / "in.npz", **{f"{i}.{k}": v.numpy() for i, b in enumerate(batches) for k, v in b.items()})
    words = [sys.executable, "-c", ALONE, str(folder), str(tmp_path / "in.npz"), str(tmp_path), str(len(batches))]
    subprocess.run(words, check=True, cwd=tmp_path)
    for i, batch in enumerate(batches):
        with torch.no_grad():
            expected = model(**batch).logits.numpy()
        np.testing.assert_allclose(np.load(tmp_path / f"{i}.npy"), expected, atol=1e-4)


def test_folder_is_complete_and_says_what_the_graph_takes(exported: Export) -> None:
    result = exported("bert-small")
    assert result.output is not None
    folder = Path(result.output)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json", "README.md", "report.md"}
    assert not any(name.endswith(".safetensors") for name in names)
    manifest = json.loads((folder / "kdtool.json").read_text())
    assert (manifest["format"], manifest["dtype"], manifest["opset"]) == ("onnx", "float32", 18)
    assert manifest["engine"] == "transformers"
    assert manifest["inputs"] == [
        {"name": name, "type": "int64", "shape": ["batch", "length"]}
        for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    assert manifest["outputs"] == [{"name": "logits", "type": "float", "shape": ["batch", 3]}]
    assert manifest["files"] == hashes(folder)
    assert {"model.onnx", "model.onnx.data"} <= set(manifest["files"])
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    card = (folder / "README.md").read_text()
    assert "onnxruntime.InferenceSession" in card
    assert "| inputs | `attention_mask` | int64 | batch x length |" in card
    assert "from_pretrained" not in card


def test_parity_is_checked_on_several_shapes(exported: Export) -> None:
    shapes = [tuple(shape["input_ids"]) for shape in exported("bert-small").proof.reload["shapes"]]
    assert len(set(shapes)) >= 4
    assert {rows for rows, _ in shapes} == {1, 2, 4}
    lengths = {shape["input_ids"][1] for shape in exported("llama-one").proof.reload["shapes"]}
    assert len(lengths) == 3


def test_graph_holds_no_paths(exported: Export) -> None:
    content = (Path(exported("bert-small").output) / "model.onnx").read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content


def test_torch_engine_writes_the_same_graph(exported: Export) -> None:
    result = exported("bert-small", "method.engine=torch")
    assert result.proof.reload["passed"]
    assert json.loads((Path(result.output) / "kdtool.json").read_text())["engine"] == "torch"


def test_a_failure_of_the_first_exporter_is_said_aloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no such operator\nmore")

    def fine(model: object, inputs: object, path: Path, opset: int, fixed: bool) -> None:
        path.touch()

    class Heard(Silent):
        said: list[str] = []

        def warn(self, text: str) -> None:
            self.said.append(text)

    loaded = SimpleNamespace(model=torch.nn.Identity(), processor=None, ref="m")
    run = SimpleNamespace(reporter=Heard())
    monkeypatch.setattr(_adapter, "_transformers_onnx", broken)
    monkeypatch.setattr(_adapter, "_torch_onnx", fine)
    assert _adapter.write_onnx(loaded, {}, tmp_path / "model.onnx", 18, "transformers", run) == "torch"
    assert Heard.said == ["transformers' exporter failed (RuntimeError: no such operator); trying torch.onnx.export"]
    monkeypatch.setattr(_adapter, "_torch_onnx", broken)
    with pytest.raises(QualityProblem, match="cannot be exported to ONNX") as caught:
        _adapter.write_onnx(loaded, {}, tmp_path / "model.onnx", 18, "transformers", run)
    assert caught.value.why == "torch: RuntimeError: no such operator; transformers: RuntimeError: no such operator"


@pytest.mark.parametrize(("embeddings", "bound"), [("false", 0.25), ("true", 0.25)])
def test_int8_is_per_channel_and_close(exported: Export, embeddings: str, bound: float) -> None:
    result = exported("bert-small", "method.precision=int8", f"method.embeddings={embeddings}")
    import onnx as package

    graph = package.load(str(Path(result.output) / "model.onnx")).graph
    products = [node for node in graph.node if node.op_type == "MatMulInteger"]
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    weights = [node.input[1] for node in products if node.input[1] in sizes]
    # query, key, value, output and two of the feed-forward part in each of two layers
    assert len(weights) >= 12
    for name in weights:
        scale = name.removesuffix("_quantized") + "_scale"
        assert sizes[scale] == [sizes[name][1]], "one scale for each output channel"
    tables = [node for node in graph.node if node.op_type == "Gather" and node.input[0].endswith("_quantized")]
    assert bool(tables) == (embeddings == "true")
    parity = result.proof.reload
    assert 0 < parity["relative_error"] < bound
    assert parity["judged_by"] == "relative_error"


def test_float16_keeps_the_types_of_inputs_and_outputs(exported: Export) -> None:
    result = exported("bert-small", "method.precision=float16")
    manifest = json.loads((Path(result.output) / "kdtool.json").read_text())
    assert manifest["outputs"][0]["type"] == "float"
    assert 0 < result.proof.reload["max_abs_diff"] <= result.proof.reload["tolerance"]
    half, whole = (
        Path(exported("bert-small", *more).output) / "model.onnx.data" for more in (["method.precision=float16"], [])
    )
    assert half.stat().st_size < 0.6 * whole.stat().st_size


@pytest.mark.parametrize(
    ("name", "data_name", "extra"),
    [("bert-small", "text", []), ("vit-one", "images", []), ("llama-one", "plain", ["data.max_length=8"])],
)
def test_evaluate_scores_the_folder_beside_its_source(
    name: str,
    data_name: str,
    extra: list[str],
    exported: Export,
    models: Callable[[str], Path],
    data: Callable[[str], Path],
) -> None:
    folder = Path(exported(name).output)
    options = {"student.model": str(folder), "teacher.model": str(models(name)), "data.source": str(data(data_name))}
    overrides = ["eval.latency_repeats=2", "eval.latency_batches=[1,3]", *extra]
    proof = evaluate(load_config("evaluate", None, overrides, options)).proof
    assert proof is not None
    assert proof.teacher is not None
    for metric, value in proof.teacher.metrics.items():
        assert proof.student.metrics[metric] == pytest.approx(value, abs=1e-4)
    assert proof.student.parameters == proof.teacher.parameters > 0
    assert proof.student.bytes == sum(path.stat().st_size for path in folder.glob("model.onnx*"))
    assert set(proof.latency_ratio) == {1, 3}


def test_graphs_that_take_less_or_more_than_the_task_makes(exported: Export, models: Callable[[str], Path]) -> None:
    from kdtool.models import load_model
    from kdtool.run import Run
    from kdtool.runtime_onnx import OnnxModel

    source = load_model(str(models("bert-small")), AUTO["bert-small"], Run(offline=True)).model
    model = OnnxModel(Path(exported("bert-small").output) / "model.onnx", source.config)
    ids = inputs_of("bert-small", 2, 7)["input_ids"]
    with torch.no_grad():
        expected = source(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids, unknown=ids, use_cache=False).logits, expected, atol=1e-5, rtol=0)
    assert list(model.parameters()) == []
    with pytest.raises(ModelProblem, match="wants the input 'input_ids'"):
        model(inputs_embeds=torch.zeros(1, 2, 16))


def test_failed_parity_sets_the_graph_aside(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Export
) -> None:
    good = Path(exported("bert-small").output)

    def wrong(loaded, batch, path, opset, engine, run, fixed):
        for name in ("model.onnx", "model.onnx.data"):
            (path.parent / name).write_bytes((good / name).read_bytes())
        weights = np.fromfile(path.parent / "model.onnx.data", dtype=np.float32)
        (weights * 1.5).tofile(path.parent / "model.onnx.data")
        return "transformers"

    monkeypatch.setattr(_adapter, "write_onnx", wrong)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.onnx").write_text("an older export")
    with pytest.raises(QualityProblem, match="differs from its source") as caught:
        export(config_of(models("bert-small"), folder, "output.overwrite=true"))
    assert caught.value.exit_code == 3
    assert "largest difference" in (caught.value.why or "")
    assert caught.value.hint == "set aside as model.onnx.failed"
    assert (folder / "model.onnx.failed").is_file()
    assert not (folder / "model.onnx").exists()
    manifest = json.loads((folder / "kdtool.json").read_text())
    assert manifest["reload"]["passed"] is False
    assert "model.onnx.failed" in manifest["files"]
    options = {"student.model": str(folder), "data.source": "anything.jsonl", "data.task": "text-classification"}
    with pytest.raises((ModelProblem, UsageProblem)):
        evaluate(load_config("evaluate", None, (), options))


def test_judge_bounds() -> None:
    probes = [{"input_ids": torch.ones(30, 2)}]
    before = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    near = before + 1e-6
    assert judge([before], [near], probes, "float32")["passed"]
    assert not judge([before], [before + 0.01], probes, "float32")["passed"]
    assert judge([before], [before + 0.01], probes, "float16")["passed"]
    assert not judge([before], [before * float("nan")], probes, "float32")["passed"]
    assert not judge([before, before], [near, before * float("nan")], probes * 2, "float32")["passed"]
    assert not judge([before], [before * float("nan")], probes, "int8")["passed"]
    swapped = before.clone()
    swapped[:5] = before[:5].flip(-1)
    parity = judge([before], [swapped], probes, "int8")
    assert not parity["passed"]
    assert "predictions kept" in parity["why"]
    few = judge([before[:5]], [before[:5] + 0.05], probes, "int8")
    assert few["passed"]
    assert "predictions kept" not in few["why"]


def test_settings_are_checked_before_any_work(tmp_path: Path) -> None:
    for override, text in (
        ("method.precision=int4", "method.precision"),
        ("method.opset=7", "method.opset"),
        ("method.presision=int8", "did you mean precision"),
        ("method.name=onnx", "unknown key 'method.name'"),
    ):
        with pytest.raises(ConfigProblem) as caught:
            config_of("m", tmp_path, override)
        assert text in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["output.dtype=float16"], "does not apply to ONNX"),
        (["method.embeddings=true"], "applies to int8 only"),
    ],
)
def test_settings_that_do_not_fit(
    overrides: list[str], text: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageProblem, match=text):
        export(config_of(models("bert-small"), tmp_path / "out", *overrides))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_missing_packages_name_the_extra(
    package: str, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageProblem, match=f"{package} is not installed") as caught:
        export(config_of(models("bert-small"), tmp_path / "out"))
    assert "kdtool[onnx]" in (caught.value.hint or "")


def test_evaluate_without_onnxruntime_names_the_extra(
    exported: Export, data: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported("bert-small").output
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    options = {"student.model": str(folder), "data.source": str(data("text"))}
    with pytest.raises(UsageProblem, match="onnxruntime is not installed") as caught:
        evaluate(load_config("evaluate", None, (), options))
    assert caught.value.hint == "pip install 'kdtool[onnx]'"


def test_damaged_graph(exported: Export, data: Callable[[str], Path], tmp_path: Path) -> None:
    for path in Path(exported("bert-small").output).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:200] if path.name == "model.onnx" else path.read_bytes())
    options = {"student.model": str(tmp_path), "data.source": str(data("text"))}
    with pytest.raises(ModelProblem, match="cannot be loaded by onnxruntime"):
        evaluate(load_config("evaluate", None, (), options))


def test_without_onnxslim_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxslim", None)
    assert _graph.slim(tmp_path / "model.onnx") is None


def test_defaults() -> None:
    assert onnx.Config() == onnx.Config(18, "float32", False, True, "transformers", None)
