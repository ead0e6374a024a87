"""`kdtool evaluate --lengths`: time and memory at sequence lengths, or one line that says why not."""

import numpy as np
import pytest
import torch

from kdtool.data.examples import Examples
from kdtool.pipelines.lengths import peak_bytes, sequence
from kdtool.tasks.text_classification import Task
from tests.pipelines.conftest import QUICK

FEW = ["--set", "eval.latency_repeats=3"]


def test_a_pair_is_measured_at_each_length(cli, models, data, tmp_path):
    pair = [models("bert-small"), "--teacher", models("bert"), "--data", data("text")]
    outcome = cli("evaluate", *pair, "--lengths", "32,8", *QUICK, *FEW, "--json", "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    found = outcome.answer["lengths"]
    assert list(found["student"]) == list(found["teacher"]) == ["8", "32"]
    for role in ("student", "teacher"):
        for entry in found[role].values():
            assert 0 < entry["median_ms"] <= entry["p95_ms"]
            assert "calls" not in entry  # neither is patched
        assert 0 < found[role]["8"]["peak_bytes"] < found[role]["32"]["peak_bytes"]
    eight = found["teacher"]["8"]["median_ms"] / found["student"]["8"]["median_ms"]
    assert found["ratio"]["8"] == pytest.approx(eight)
    assert found["real_tokens"] == {"8": 8, "32": 32}
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| time, 32 tokens (ms) |" in report
    assert "| memory, 8 tokens |" in report
    assert "## Lengths" in report


def test_rotary_positions_go_on_and_short_data_is_filled_up_both_said(cli, models, data):
    arguments = ["--data", data("plain"), "--set", "data.max_length=16", "--lengths", "256"]
    outcome = cli("evaluate", models("llama-small"), *arguments, *QUICK, *FEW, "--json")
    assert outcome.code == 0, outcome.err
    found = outcome.answer["lengths"]
    real = found["real_tokens"]["256"]
    assert 0 < real < 256
    assert found["ratio"] == found["teacher"] == {}
    beyond, made = found["notes"]
    assert "made for 64 positions" in beyond
    assert f"The test rows hold {real} tokens: at 256 the rest of the input is drawn" in made


MISTAKES = {
    "positions": ("bert-small", "text", "16,33", "--lengths 33: ", "at most 32 tokens"),
    "images": ("vit-small", "images", "16", "applies to models of text, not to image-classification", ""),
    "words": ("bert-small", "text", "many", "--lengths many", "such as --lengths 512,2048"),
    "one": ("bert-small", "text", "1", "should be 2 and more", ""),
}


@pytest.mark.parametrize(("model", "rows", "lengths", "said", "more"), MISTAKES.values(), ids=MISTAKES)
def test_what_cannot_be_measured_is_refused_in_one_line(cli, models, data, tmp_path, model, rows, lengths, said, more):
    outcome = cli("evaluate", models(model), "--data", data(rows), "--lengths", lengths, "-o", tmp_path / "out")
    assert outcome.code == 2
    assert said in outcome.problem
    assert more in outcome.err
    assert not (tmp_path / "out").exists()


def test_rows_are_joined_cut_and_filled_up_from_their_own_ids():
    rows = Examples({"input_ids": [np.arange(5), np.arange(5, 9), np.arange(9, 20)]})
    batch, real = sequence(Task(), rows, 7, 0)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1] * 7]
    assert real == 7
    batch, real = sequence(Task(), rows, 50, 0)
    assert batch["input_ids"].shape == (1, 50)
    assert real == 20
    assert set(batch["input_ids"][0, 20:].tolist()) <= set(range(20))


def test_peak_memory_is_what_is_held_at_a_time():
    x = torch.randn(100, 100)

    def run():
        y = x @ x
        y = y + 1  # with the product three matrices at a time would be too many
        return y.sum()

    assert 2 * x.nbytes <= peak_bytes(torch.nn.Identity(), run, "cpu") < 2.1 * x.nbytes
