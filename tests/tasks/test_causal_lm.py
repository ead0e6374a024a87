"""Language models: windows, shifted targets and exact counts, against naive loops."""

import math

import numpy as np
import pytest
import torch
import transformers

from kdtool.data.examples import DataSplits, Examples
from kdtool.errors import DataProblem
from kdtool.pipelines.setup import encode
from kdtool.registry import METHODS
from kdtool.run import Run
from tests import tiny

NAME = "causal-lm"
TEXTS = [row["text"] for row in tiny.text_rows(20, 9)]
WINDOW = 8


@pytest.fixture
def ready(opened, config):
    task, loaded = opened(NAME, "llama-small")
    encoded = task.encode(Examples({"text": TEXTS}), loaded, config(f"data.max_length={WINDOW}"), Run())
    return task, loaded, encoded


def test_windows_hold_every_token_once_in_order(ready):
    _, loaded, encoded = ready
    stream = []
    for text in TEXTS:
        stream.append(loaded.processor.bos_token_id)
        stream += [loaded.processor.get_vocab()[word] for word in text.split()]
    assert len(encoded) == len(stream) // WINDOW
    assert encoded.columns["input_ids"].reshape(-1).tolist() == stream[: len(encoded) * WINDOW]


def naive(model, windows):
    """Loss and hits of each predicted token, one at a time."""
    losses, hits = [], []
    with torch.no_grad():
        for window in windows.tolist():
            for position in range(1, len(window)):
                row = model(torch.tensor([window[:position]])).logits[0, -1].double()
                losses.append(float(row.logsumexp(0) - row[window[position]]))
                hits.append(int(row.argmax()) == window[position])
    return losses, hits


def test_evaluation_counts_every_predicted_token_once(ready):
    task, loaded, encoded = ready
    few = encoded.select(range(5))
    losses, hits = naive(loaded.model, few.columns["input_ids"])
    assert len(losses) == 5 * (WINDOW - 1)
    for size in (1, 2, 64):
        found = task.evaluate(loaded.model, few, Run(), task.metrics, size)
        assert found.metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert found.metrics["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
        assert found.metrics["token-accuracy"] == pytest.approx(np.mean(hits))


def test_a_step_counts_predicted_tokens(ready, opened):
    task, loaded, encoded = ready
    losses, _ = naive(loaded.model, encoded.columns["input_ids"][:3])
    method = METHODS.get("none")(METHODS.build_config("none", {}), loaded, [], task).eval()
    found = method(task.collate([encoded[i] for i in range(3)]), 0.0)
    assert found.count == len(losses) == 3 * (WINDOW - 1)
    assert float(found.total.detach()) == pytest.approx(sum(losses), rel=1e-5)


def test_too_little_text(ready, config):
    task, loaded, _ = ready
    with pytest.raises(DataProblem, match="fewer than one window of 64") as caught:
        task.encode(Examples({"text": ["the film was great"]}), loaded, config("data.max_length=64"), Run())
    assert "data.max_length" in caught.value.hint


def test_other_tokenizers_are_refused(ready, opened, config, tmp_path):
    task, student, _ = ready
    _, teacher = opened(NAME, "llama")
    tiny.save_bert_tokenizer(tmp_path, reverse=True)
    teacher.processor = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rows = Examples({"text": TEXTS})
    with pytest.raises(DataProblem, match="different tokenizers"):
        encode(
            task,
            DataSplits(rows, None, rows, None, {}),
            student,
            teacher,
            config("data.max_length=8", "method.name=kd"),
            Run(),
        )


def test_example_inputs_have_no_labels(ready):
    task, _, encoded = ready
    assert task.example_inputs(encoded, 3)["input_ids"].shape == (3, WINDOW)
