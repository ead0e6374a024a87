"""The engine optimum runs in another environment; a script stands in for it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kdtool.errors import QualityProblem, UsageProblem
from kdtool.pipelines import export
from kdtool.pipelines.architectures import task_by_optimum
from tests.exporters.conftest import Export, config_of

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def stand_in(folder: Path, body: str) -> Path:
    script = folder / "python"
    script.write_text(f"#!{sys.executable}\nimport json, shutil, sys\nfrom pathlib import Path\n{body}\n")
    script.chmod(0o755)
    return script


def test_it_is_run_with_task_folder_and_opset(exported: Export, models: Callable[[str], Path], tmp_path: Path) -> None:
    good = exported("bert-small").output
    body = (
        f"Path({str(tmp_path / 'words.json')!r}).write_text(json.dumps(sys.argv[1:]))\n"
        "out = Path(sys.argv[-1]); out.mkdir()\n"
        f"for name in ('model.onnx', 'model.onnx.data'): shutil.copy(Path({str(good)!r}) / name, out)\n"
        "(out / 'config.json').write_text('{}')"
    )
    python = stand_in(tmp_path, body)
    folder = tmp_path / "out"
    result = export(
        config_of(
            models("bert-small"), folder, "method.engine=optimum", f"method.optimum_python={python}", "method.opset=19"
        )
    )
    words = json.loads((tmp_path / "words.json").read_text())
    assert words[:4] == ["-m", "optimum.commands.optimum_cli", "export", "onnx"]
    assert words[4:10] == ["--model", str(models("bert-small")), "--task", "text-classification", "--opset", "19"]
    assert result.proof.reload["passed"]
    assert json.loads((folder / "kdtool.json").read_text())["engine"] == "optimum"
    assert not (folder / "optimum").exists()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"


@pytest.mark.parametrize(
    ("python", "text"), [(None, "needs an environment of its own"), ("/no/such/python", "is no program")]
)
def test_without_an_environment_it_says_how_to_make_one(
    python: str | None, text: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    overrides = ["method.engine=optimum"] + ([f"method.optimum_python={python}"] if python else [])
    with pytest.raises(UsageProblem, match=text) as caught:
        export(config_of(models("bert-small"), tmp_path / "out", *overrides))
    assert "optimum-onnx" in (caught.value.hint or "")
    assert "method.optimum_python" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("message", "kind"), [("No module named 'optimum'", UsageProblem), ("ValueError: no such model", QualityProblem)]
)
def test_its_last_line_is_passed_on(
    message: str, kind: type[Exception], models: Callable[[str], Path], tmp_path: Path
) -> None:
    python = stand_in(tmp_path, f"sys.exit({('noise' + chr(10) + message)!r})")
    overrides = ["method.engine=optimum", f"method.optimum_python={python}"]
    config = config_of(models("bert-small"), tmp_path / "out", *overrides)
    with pytest.raises(kind, match="optimum could not export") as caught:
        export(config)
    assert caught.value.why == message


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("ReformerModelWithLMHead", "causal-lm"),
        ("BertForSequenceClassification", "text-classification"),
        ("BertForQuestionAnswering", None),
        ("NoSuchModel", None),
    ],
)
def test_tasks_of_odd_architectures(architecture: str, task: str | None) -> None:
    assert task_by_optimum({"architectures": [architecture]}) == task
    assert task_by_optimum({}) is None
