"""Encoders with decoders: what each side reads, exact figures, and texts."""

import numpy as np
import pytest
import torch
import transformers

from kdtool.config import load_config
from kdtool.data.examples import Examples
from kdtool.errors import DataProblem, ModelProblem
from kdtool.pipelines.distill import distill
from kdtool.pipelines.setup import pick_task
from kdtool.run import Run
from kdtool.tasks._writing import Writing, decoder_start, write

NAME = "seq2seq-lm"
ROWS = [("the film was", "great"), ("a very dull book", "it was awful here"), ("we saw it", "plain and fine")]


@pytest.fixture
def ready(opened, config):
    task, loaded = opened(NAME, "t5-small")

    def call(*overrides, rows=ROWS):
        prompts, responses = zip(*rows, strict=True)
        return task.encode(Examples({"prompt": prompts, "response": responses}), loaded, config(*overrides), Run())

    return task, loaded, call


def test_a_decoder_reads_what_it_is_to_write_one_later(ready):
    task, loaded, encode = ready
    encoded = encode()
    words = loaded.processor.convert_ids_to_tokens
    assert words(encoded[1]["input_ids"].tolist()) == ["a", "very", "dull", "book", "[SEP]"]
    assert words(encoded[1]["labels"].tolist()) == ["it", "was", "awful", "here", "[SEP]"]
    assert words(encoded[1]["decoder_input_ids"].tolist()) == ["[PAD]", "it", "was", "awful", "here"]
    batch = task.collate([encoded[i] for i in range(3)])
    expected = loaded.model._shift_right(batch["labels"])
    real = batch["decoder_attention_mask"] != 0
    assert torch.equal(batch["decoder_input_ids"][real], expected[real])
    assert task.units(batch).tolist() == [2, 5, 4]
    assert (batch["labels"][~real] == -100).all()
    assert set(task.example_inputs(encoded, 2)) == set(batch) - {"labels"}


@torch.no_grad()
def test_figures_are_those_of_single_rows_whatever_the_batch(ready):
    task, loaded, encode = ready
    encoded = encode()
    losses = []
    for i in range(3):
        row = {key: torch.from_numpy(encoded[i][key])[None] for key in ("input_ids", "labels")}
        out = loaded.model(**row)
        losses += torch.nn.functional.cross_entropy(out.logits[0], row["labels"][0], reduction="none").tolist()
    for size in (1, 2, 64):
        found = task.evaluate(loaded.model, encoded, Run(), ["loss"], size)
        assert found.metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


@torch.no_grad()
def test_texts_do_not_depend_on_the_batch(ready):
    task, loaded, encode = ready
    encoded = encode(rows=[*ROWS, ("it", "x"), ("the meal was very slow and usual", "y")])
    prompts = [task.prompt_of(encoded[i]) for i in range(5)]
    expected = []
    for prompt in prompts:
        written = [0]
        for _ in range(6):
            logits = loaded.model(torch.from_numpy(prompt)[None], decoder_input_ids=torch.tensor([written])).logits
            written.append(int(logits[0, -1].argmax()))
            if written[-1] == 3:
                break
        expected.append(loaded.processor.decode(written[1:], skip_special_tokens=True).strip())
    for size in (1, 2, 64):
        assert write(loaded.model, loaded.processor, prompts, Writing(6), size, Run()) == expected
    found = task.evaluate(loaded.model, encoded, Run(), ["exact-answer", "loss"], 2)
    assert set(found.metrics) == {"exact-answer", "loss"}


def test_what_is_too_long(ready):
    _, _, encode = ready
    rows = [*ROWS, ("the " * 20, "great"), ("was", "very " * 20), ("", "")]
    encoded = encode("data.max_length=6", rows=rows)
    assert [len(row) for row in encoded.columns["input_ids"]] == [4, 5, 4, 2, 1]
    assert [len(row) for row in encoded.columns["labels"]] == [2, 5, 4, 6, 1]
    cut = encode("data.max_length=6", "data.long_prompts=cut", rows=rows)
    assert cut.columns["input_ids"][3].tolist() == [*cut.columns["input_ids"][0][:1].tolist() * 5, 3]
    with pytest.raises(DataProblem, match="none of 1 rows"):
        encode("data.max_length=6", rows=[("the " * 20, "great")])


def test_the_start_of_a_decoder_is_named_or_asked_for():
    config = transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(ModelProblem, match="what its decoder begins with"):
        decoder_start(model)
    model.generation_config.decoder_start_token_id = 7
    assert decoder_start(model) == 7


@pytest.mark.parametrize("method", ["kd", "skd"])
def test_a_run(models, data, tmp_path, method):
    options = {
        "teacher.model": str(models("t5")),
        "student.model": str(models("t5-small")),
        "data.source": str(data("prompts")),
        "method.name": method,
        "output.folder": str(tmp_path / "out"),
        "train.max_steps": 3,
        "train.batch_size": 4,
        "eval.latency_repeats": 1,
        "eval.reload": False,
        "output.plots": False,
    }
    config = load_config("distill", None, [], options)
    assert pick_task(config, options["teacher.model"], Run(offline=True)).name == NAME
    result = distill(config)
    assert set(result.proof.student.metrics) == {"loss", "perplexity", "token-accuracy", "agreement"}
