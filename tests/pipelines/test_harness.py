"""Scores of lm-evaluation-harness on local tasks, offline."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from kdtool.config import load_config
from kdtool.errors import DataProblem, UsageProblem
from kdtool.models import load_model
from kdtool.pipelines.evaluate import evaluate
from kdtool.pipelines.harness import _figures
from kdtool.pipelines.plan import plan
from kdtool.run import Run
from tests import tiny

ROWS = [
    {"q": "the film was", "choices": ["great", "dull", "slow"], "gold": 0},
    {"q": "we saw a", "choices": ["book", "meal", "bright"], "gold": 1},
    {"q": "it is", "choices": ["fine", "usual", "warm"], "gold": 2},
    {"q": "this meal was very", "choices": ["plain", "awful", "good"], "gold": 0},
]
TASK = """task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task_file(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tiny.write_rows(tmp_path / "rows.jsonl", ROWS)
    path = tmp_path / "tiny.yaml"
    path.write_text(TASK.format(rows=rows))
    return path


def config_of(models, benchmark, *overrides, **more):
    options = {
        "student.model": str(models("llama-small")),
        "eval.benchmark": benchmark,
        "runtime.offline": True,
        **more,
    }
    return load_config("evaluate", None, overrides, options | more)


def test_a_local_task_is_scored_as_the_model_ranks_its_choices(models, task_file, tmp_path):
    more = {"teacher.model": str(models("llama")), "output.folder": str(tmp_path / "out")}
    result = evaluate(config_of(models, f"lm-eval:{task_file}", "eval.fail_under=[acc=0.0]", **more))
    loaded = load_model(str(models("llama-small")), "AutoModelForCausalLM", Run())
    tokenizer, right = AutoTokenizer.from_pretrained(models("llama-small")), []
    for row in ROWS:
        scores = []
        for choice in row["choices"]:
            ids = tokenizer(f"{row['q']} {choice}", add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = loaded.model(ids).logits[0, -2].log_softmax(-1)
            scores.append(float(logits[ids[0, -1]]))
        right.append(int(torch.tensor(scores).argmax()) == row["gold"])
    assert result.proof.student.metrics == {"acc": sum(right) / 4}
    assert result.proof.student.errors["acc"] > 0
    assert set(result.proof.teacher.metrics) == {"acc"}
    assert result.proof.gates[0].passed
    assert json.loads((tmp_path / "out" / "result.json").read_text())["metrics"]["student"] == {"acc": sum(right) / 4}


def test_mistakes_are_one_line(models, task_file, tmp_path):
    with pytest.raises(UsageProblem, match="does not exist"):
        evaluate(config_of(models, "lm-eval:./no-such.yaml"))
    code = tmp_path / "code" / "code.yaml"
    code.parent.mkdir()
    code.write_text("task: x\nprocess_docs: !function utils.f\n")
    with pytest.raises(UsageProblem, match="names Python code"):
        evaluate(config_of(models, f"lm-eval:{code}"))
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataProblem, match="lm-eval cannot score"):
        evaluate(config_of(models, f"lm-eval:{task_file}"))


def test_it_is_no_data_to_train_on_and_can_be_planned(models):
    options = {"teacher.model": str(models("llama")), "student.model": "layers:1", "method.name": "kd"}
    with pytest.raises(UsageProblem, match="scores a finished model") as caught:
        plan(load_config("distill", None, ["eval.benchmark=lm-eval:arc_easy"], options))
    assert "kdtool evaluate MODEL --benchmark lm-eval:arc_easy" in caught.value.hint
    found = plan(config_of(models, "lm-eval:arc_easy"))
    assert found["task"] == "causal-lm"


def test_names_of_figures():
    results = {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": "N/A", "exact_match,strict": 1, "sample_len": 3}}
    assert _figures(results) == ({"acc": 0.5, "exact_match-strict": 1.0}, {})
    both = results | {"b": {"acc,none": 0.25, "acc_stderr,none": 0.1}}
    assert _figures(both)[0].keys() == {"a/acc", "a/exact_match-strict", "b/acc"}
    assert _figures(both)[1] == {"b/acc": 0.1}
