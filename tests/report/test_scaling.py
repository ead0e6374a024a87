"""Temperature scaling: fitted on validation rows, judged on the test rows, shown and kept."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from kdtool.data.examples import Examples
from kdtool.pipelines.prove import scaling
from kdtool.proof import Proof, Result, Side
from kdtool.report import write_report
from kdtool.sections import RunConfig
from kdtool.tasks._base import Evaluation


def drawn(seed, rows, factor):
    """Logits of a calibrated model times a factor, and labels drawn from the model."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, 5)) * 2
    odds = np.exp(logits)
    odds /= odds.sum(1, keepdims=True)
    labels = np.array([rng.choice(5, p=p) for p in odds])
    return logits * factor, labels


class Task:
    """Says of the rows what they hold."""

    def evaluate(self, model, data, run, metrics, batch_size, teacher=None):
        assert not metrics
        return Evaluation({}, {}, np.asarray(data.columns["logits"]), np.asarray(data.columns["labels"]), len(data))


def scaled(config=None, validation=True, factor=4.0):
    logits, labels = drawn(0, 3000, factor)
    found = Evaluation({}, {}, logits, labels, len(labels))
    rows = Examples(dict(zip(("logits", "labels"), drawn(1, 3000, factor), strict=True))) if validation else None
    return scaling(Task(), SimpleNamespace(model=None), found, rows, config or RunConfig(), None)


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_the_temperature_undoes_what_made_the_model_too_sure(factor):
    found = scaled(factor=factor)
    assert found["temperature"] == pytest.approx(factor, rel=0.1)
    assert found["rows"] == 3000
    assert found["after"]["ece"] < 0.03
    assert found["after"]["nll"] <= found["before"]["nll"] + 1e-3
    if factor != 1.0:
        assert found["after"]["ece"] < found["before"]["ece"] / 2


def test_it_is_left_out_without_validation_rows_or_when_switched_off():
    assert scaled(validation=False) == {}
    config = RunConfig()
    config.eval.temperature_scaling = "off"
    assert scaled(config) == {}


def test_report_and_json_show_it(tmp_path):
    side = Side("m", None, 10, 40, {"accuracy": 0.5, "ece": 0.2}, reliability=[(0.5, 0.25, 4), (0.9, float("nan"), 0)])
    side.scaling = scaled()
    proof = Proof(side)
    write_report(tmp_path, proof, [], RunConfig(command="evaluate"), plots=False)
    text = (tmp_path / "report.md").read_text()
    assert f"{side.scaling['temperature']:.3f} (model)" in text
    assert "| classwise-ece |" in text
    values = Result("evaluate", None, proof, 1.0).as_json()
    json.dumps(values, allow_nan=False)
    assert values["temperature_scaling"]["student"]["after"].keys() == side.scaling["after"].keys()
    assert values["reliability"]["student"] == [
        {"confidence": 0.5, "accuracy": 0.25, "count": 4},
        {"confidence": 0.9, "accuracy": None, "count": 0},
    ]
