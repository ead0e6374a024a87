"""Rows of tables: which columns are features, what is learnt from training rows, and whole runs."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModel

from kdtool import load
from kdtool.config import load_config
from kdtool.data.table import FEATURES
from kdtool.errors import DataProblem, UsageProblem
from kdtool.modeling import TabularClassifier, TabularProcessor
from kdtool.pipelines.distill import distill
from kdtool.pipelines.setup import get_data, pick_task
from kdtool.registry import METHODS, TASKS, check_fit
from kdtool.run import Run, Silent
from tests import tiny

TASK = "tabular-classification"
CSV = "id,proto,port,bytes,service,label\n" + "".join(
    f"{i},{['tcp', 'udp'][i % 2]},{[80, 53][i % 2]},{10.5 * i if i % 3 else ''},{'' if i == 4 else 'x'},{'ab'[i % 2]}\n"
    for i in range(1, 13)
)


class Heard(Silent):
    def __init__(self):
        self.lines = []

    def info(self, message):
        self.lines.append(message)


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "flows.csv"
    path.write_text(CSV)
    return path


def rows_of(path, *overrides, run=None):
    config = load_config("distill", None, overrides, {"data.source": str(path), "data.task": TASK})
    task = TASKS.get(TASK)()
    data = get_data(config, task, run or Run())
    return task, data, config


def test_columns_are_guessed_and_said_aloud(csv):
    run = Run(reporter=Heard())
    task, data, config = rows_of(csv, run=run)
    processor = task.fit_processor(data.train, config, run)
    assert [column["name"] for column in processor.numeric] == ["port", "bytes"]
    assert [column["name"] for column in processor.categorical] == ["proto", "service"]
    assert "features: id left out, which number the rows" in run.reporter.lines
    assert "features: 2 (port, bytes) numeric; 2 (proto, service) categorical" in run.reporter.lines


def test_columns_can_be_chosen(csv):
    task, data, config = rows_of(
        csv, "data.features=[id,port,proto,bytes]", "data.ignore=[proto]", "data.categorical=[port]"
    )
    processor = task.fit_processor(data.train, config, Run())
    assert [column["name"] for column in processor.numeric] == ["id", "bytes"]
    assert processor.categorical == [{"name": "port", "values": ["53", "80"]}] or processor.categorical == [
        {"name": "port", "values": ["80", "53"]}
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.features=[porrt]"], "no column 'porrt'"),
        (["data.features=[label]"], "is the label"),
        (["data.features=[port]", "data.ignore=[port]"], "no columns besides the label"),
    ],
)
def test_wrong_choices_are_refused(csv, overrides, message):
    with pytest.raises(DataProblem, match=message):
        rows_of(csv, *overrides)


def test_text_in_a_column_of_numbers_is_named(csv):
    task, data, config = rows_of(csv, "data.numeric=[proto]")
    with pytest.raises(DataProblem, match=r"'proto'.*no numbers") as caught:
        task.fit_processor(data.train, config, Run())
    assert "data.categorical=[proto]" in caught.value.hint


def test_a_missing_column_is_named(opened, tmp_path):
    task, loaded = opened(TASK, "tabular")
    rows = [{name: row[name] for name in ("size", "kind", "label")} for row in tiny.table_rows(9, 1)]
    _, data, config = rows_of(tiny.write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(DataProblem, match="no column 'weight', which the model needs"):
        task.encode(data.test, loaded, config, Run())


def test_statistics_and_vocabularies_are_those_of_the_training_rows():
    numbers = np.array([1.0, 3.0, np.nan, 5.0])
    processor = TabularProcessor.fit({"x": numbers, "same": np.full(4, 7.0)}, {"c": ["a", "a", None, "b"]})
    made = processor.encode({"x": np.array([3.0, np.nan]), "same": np.array([7.0, 8.0])}, {"c": ["b", None]})
    std = np.std([1.0, 3.0, 5.0])
    assert processor.numeric[0] == {"name": "x", "mean": 3.0, "std": std, "log": False, "gaps": True}
    np.testing.assert_allclose(made["numeric"], [[0, 0, 0], [0, 1, 1]], atol=1e-6)
    assert made["categories"].tolist() == [[0], [1]]  # b was there once: unknown
    assert processor.sizes == {"num_numeric": 3, "num_columns": 1, "num_categories": 3}


def test_ids_of_columns_do_not_overlap():
    processor = TabularProcessor.fit({}, {"a": ["x", "x", "y", "y"], "b": ["x", "x", "z", "z"]})
    made = processor.encode({}, {"a": ["x", "y", "?"], "b": ["z", None, "x"]})
    assert made["categories"].tolist() == [[2, 7], [3, 5], [0, 6]]
    assert "numeric" not in made


def test_columns_with_values_far_out_are_compressed():
    values = np.concatenate([np.zeros(999), [1e9]])
    processor = TabularProcessor.fit({"x": values}, {})
    assert processor.numeric[0]["log"]
    made = processor.encode({"x": np.array([-1e9, 0.0, 1e9])}, {})["numeric"][:, 0]
    assert made[0] < made[1] < made[2]
    assert abs(made).max() < 100


def test_the_processor_travels_as_json_and_takes_single_rows(opened, models, data, config, tmp_path):
    task, loaded = opened(TASK, "tabular")
    _, splits, _ = rows_of(data("table"))
    encoded = task.encode(splits.test, loaded, config(), Run())
    loaded.processor.save_pretrained(tmp_path)
    again = AutoFeatureExtractor.from_pretrained(models("tabular"))
    assert again.to_dict() == loaded.processor.to_dict()
    assert "mean" in json.loads((tmp_path / "preprocessor_config.json").read_text())["numeric"][0]
    one = again(tiny.table_rows(12, 8), return_tensors="pt")
    for key in ("numeric", "categories"):
        torch.testing.assert_close(one[key], torch.from_numpy(np.asarray(encoded.columns[key])))


def test_auto_classes_and_the_task_are_known(models, config):
    assert isinstance(AutoModel.from_pretrained(models("tabular")), TabularClassifier)
    settings = load_config("distill")
    assert pick_task(settings, str(models("tabular")), Run(offline=True)).name == TASK


@pytest.mark.parametrize("name", ["at", "mgd"])
def test_a_method_that_does_not_fit_says_why(name):
    with pytest.raises(UsageProblem) as caught:
        check_fit(name, TASK)
    assert caught.value.why.startswith("it needs feature")
    assert " kd, " in caught.value.hint
    assert TASK not in METHODS.info(name).facts["tasks"]


def run(out, student, data, *overrides, teacher=None):
    fixed = ["eval.latency=false", "eval.reload=false", "output.plots=false", "train.max_steps=30", "train.lr=0.02"]
    options = {
        "teacher.model": teacher,
        "student.model": str(student),
        "data.source": str(data),
        "output.folder": str(out),
    }
    return distill(load_config("distill", None, [*fixed, *overrides], {k: v and str(v) for k, v in options.items()}))


def test_a_teacher_from_a_file_then_a_student_of_its_layers_and_one_from_a_file(data, tmp_path):
    values = {"model_type": "kdtool-tabular", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    (tmp_path / "teacher.json").write_text(json.dumps(values))
    (tmp_path / "student.json").write_text(json.dumps(values | {"num_hidden_layers": 1}))
    first = run(tmp_path / "teacher", tmp_path / "teacher.json", data("table"), "method.name=none")
    assert first.proof.student.metrics["accuracy"] > 0.7
    teacher = tmp_path / "teacher"
    for name in ("layers:1", tmp_path / "student.json"):
        out = tmp_path / f"out-{str(name)[-6:-1].replace(':', '')}"
        run(out, name, data("table"), "method.name=kd", teacher=teacher)
        assert load(out).config.num_hidden_layers == 1
        kept, given = (json.loads((folder / "preprocessor_config.json").read_text()) for folder in (out, teacher))
        assert kept == given


def test_features_are_in_data_order_after_selection(csv):
    _, data, _ = rows_of(csv, "data.holdout=0.25", "data.limit=5")
    rows = data.train.columns[FEATURES]
    assert len(rows) == 5
    assert rows.numbers("id").tolist() == sorted(rows.numbers("id"))
    assert set(rows[0]) == {"id", "proto", "port", "bytes", "service"}
