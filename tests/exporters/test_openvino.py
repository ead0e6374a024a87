import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kdtool.config import load_config
from kdtool.errors import ModelProblem, UsageProblem
from kdtool.pipelines import evaluate, export
from tests.exporters.conftest import config_of


def test_without_openvino_the_extra_is_named(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageProblem, match="openvino is not installed") as caught:
        export(config_of(models("bert-small"), tmp_path / "out", fmt="openvino"))
    assert caught.value.hint == "pip install 'kdtool[openvino]'"


def test_dtype_belongs_to_safetensors(models: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(UsageProblem, match="does not apply to OpenVINO"):
        export(config_of(models("bert-small"), tmp_path / "out", "output.dtype=float16", fmt="openvino"))


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_graph_is_exact_in_float32_and_the_default_is_reported(
    precision: str, models: Callable[[str], Path], data: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    folder = tmp_path / "out"
    result = export(config_of(models("bert-small"), folder, f"method.precision={precision}", fmt="openvino"))
    parity = result.proof.reload
    assert parity["passed"]
    assert parity["default_precision"] in {"f32", "bf16", "f16"}
    assert parity["default_max_abs_diff"] >= 0
    names = {path.name for path in folder.iterdir()}
    assert names >= {"openvino_model.xml", "openvino_model.bin", "config.json", "tokenizer.json", "README.md"}
    manifest = json.loads((folder / "kdtool.json").read_text())
    assert [value["name"] for value in manifest["inputs"]] == ["input_ids", "attention_mask", "token_type_ids"]
    assert "INFERENCE_PRECISION_HINT" in (folder / "README.md").read_text()
    options = {"student.model": str(folder), "data.source": str(data("text"))}
    with pytest.raises(ModelProblem, match="OpenVINO export, which kdtool does not score"):
        evaluate(load_config("evaluate", None, (), options))
