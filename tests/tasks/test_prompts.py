"""Prompts, responses and conversations: what counts, what is around it, what is cut, and exact figures."""

import numpy as np
import pytest
import torch

from kdtool.config import load_config
from kdtool.data.chats import conversations
from kdtool.data.examples import Examples
from kdtool.errors import DataProblem
from kdtool.metrics import ratio_and_error
from kdtool.pipelines.distill import distill
from kdtool.pipelines.setup import get_data
from kdtool.registry import TASKS
from kdtool.run import Run, Silent
from kdtool.tasks._prompts import pieces_of
from tests import tiny
from tests.kits import gradients, make_kit

NAME = "causal-lm"
ROWS = [("the film was", "great"), ("a very dull book", "it was awful here"), ("we saw it", "plain and fine")]
CHATML = (
    "{% for m in messages %}[CLS] {{ m.role }} {{ m.content }} [SEP] a {% endfor %}"
    "{% if add_generation_prompt %}[CLS] assistant {% endif %}"
)


class Heard(Silent):
    def __init__(self):
        self.lines = []

    def info(self, message):
        self.lines.append(message)

    warn = info


def examples(rows=ROWS, **more):
    prompts, responses = zip(*rows, strict=True)
    return Examples({"prompt": list(prompts), "response": list(responses), **more})


@pytest.fixture
def ready(opened, config):
    task, loaded = opened(NAME, "llama-small")

    def call(rows, *overrides, run=None):
        return task.encode(rows, loaded, config(*overrides), run or Run())

    return task, loaded, call


def words(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(list(map(int, ids))))


def parts(tokenizer, row):
    """The row as text, and what of it counts."""
    return words(tokenizer, row["input_ids"]), words(tokenizer, row["input_ids"][row["counted"]])


# What counts


def test_responses_and_their_end_count_and_prompts_do_not(ready):
    task, loaded, encode = ready
    encoded = encode(examples())
    assert parts(loaded.processor, encoded[1]) == (
        "[CLS] a very dull book it was awful here [SEP]",
        "it was awful here [SEP]",
    )
    batch = task.collate([encoded[i] for i in range(3)])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths == encoded.lengths.tolist() == [6, 10, 8]
    for row, length in enumerate(lengths):
        labels, ids = batch["labels"][row], batch["input_ids"][row]
        assert (labels[length:] == -100).all()
        counts = labels != -100
        assert torch.equal(labels[counts], ids[counts])
        first = int(counts.int().argmax())
        assert counts[first:length].all()
        assert words(loaded.processor, ids[:first]) == f"[CLS] {ROWS[row][0]}"
    assert task.units(batch).tolist() == [2, 5, 4]


def naive(model, encoded):
    """Loss and hits of each counted token, one row and one prefix at a time."""
    losses, hits = [], []
    with torch.no_grad():
        for i in range(len(encoded)):
            ids, counted = encoded[i]["input_ids"], encoded[i]["counted"]
            for place in np.flatnonzero(counted):
                logits = model(torch.from_numpy(ids[None, :place])).logits[0, -1].double()
                losses.append((i, float(logits.logsumexp(0) - logits[ids[place]])))
                hits.append(int(logits.argmax()) == ids[place])
    return losses, hits


def test_figures_are_means_over_counted_tokens_whatever_the_batch(ready):
    task, loaded, encode = ready
    encoded = encode(examples())
    losses, hits = naive(loaded.model, encoded)
    mean = np.mean([loss for _, loss in losses])
    for size in (1, 2, 64):
        found = task.evaluate(loaded.model, encoded, Run(), task.metrics, size)
        assert found.metrics["loss"] == pytest.approx(mean, rel=1e-5)
        assert found.metrics["perplexity"] == pytest.approx(np.exp(mean), rel=1e-5)
        assert found.metrics["token-accuracy"] == pytest.approx(np.mean(hits))
    sums = np.array([sum(loss for row, loss in losses if row == i) for i in range(3)])
    assert found.errors["loss"] == pytest.approx(ratio_and_error(sums, np.array([2, 5, 4]))[1], rel=1e-5)


def test_the_error_of_a_mean_over_ragged_rows_is_that_of_resampled_rows():
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 20, 400)
    sums = counts * generator.normal(2, 0.5, 400) + generator.normal(0, 1, 400)
    mean, error = ratio_and_error(sums, counts)
    chosen = generator.integers(0, 400, (4000, 400))
    draws = sums[chosen].sum(1) / counts[chosen].sum(1)
    assert error == pytest.approx(draws.std(), rel=0.05)
    equal, spread = ratio_and_error(sums, np.ones(400))
    assert (equal, spread) == (pytest.approx(sums.mean()), pytest.approx(sums.std(ddof=1) / 20))
    assert mean == pytest.approx(sums.sum() / counts.sum())


@pytest.mark.parametrize("name", ["none", "kd", "sinkd"])
def test_a_step_on_ragged_rows_adds_up_and_sees_no_padding(name, models, data):
    kit = make_kit(NAME, models, data, "prompts")
    found = []
    for parts_of in ([[0, 1, 2, 3]], [[0, 1], [2, 3]] if name == "sinkd" else [[0], [1], [2], [3]]):
        method = kit.build(name).eval()
        losses = [method(kit.batch(rows), 0.5) for rows in parts_of]
        sum(one.total for one in losses).backward()
        found.append((sum(int(one.count) for one in losses), gradients(method)))
    batch = kit.batch([0, 1, 2, 3])
    assert found[0][0] == found[1][0] == int(kit.task.units(batch).sum())
    assert int((batch["attention_mask"] == 0).sum()) > 0
    if name == "sinkd":
        return  # it couples the samples of a batch
    for key, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], gradient, rtol=1e-4, atol=1e-5)


# What is put around


def test_inputs_follow_instructions_and_separators_stand_where_there_is_no_space(opened, config):
    _, loaded = opened(NAME, "llama-small")
    rows = Examples({"prompt": ["sum up", "say: "], "input": ["a text", ""], "response": ["x", "y"]})
    made, begin = pieces_of(rows, loaded.processor, config().data)
    assert [[piece.text for piece in row] for row in made] == [["sum up\na text\n", "x"], ["say: ", "y"]]
    assert begin == [2]
    made, _ = pieces_of(rows, loaded.processor, config("data.separator=' => '").data)
    assert made[0][0].text == "sum up => a text => "


def talk(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_conversations_without_a_template_have_a_plain_form(opened, config):
    _, loaded = opened(NAME, "llama-small")
    messages = [{"role": "system", "content": "be kind"}, *talk("hi", "good", "so", "fine", "left over")]
    made, begin = pieces_of(Examples({"messages": [messages]}), loaded.processor, config().data)
    assert [piece.text for piece in made[0]] == [
        "System:\nbe kind\n\nUser:\nhi\n\nAssistant:\n",
        "good",
        "User:\nso\n\nAssistant:\n",
        "fine",
    ]
    assert [piece.counts for piece in made[0]] == [False, True, False, True]
    assert begin == [2]


def test_every_answer_of_a_template_counts_up_to_its_end(ready):
    _, loaded, encode = ready
    loaded.processor.chat_template = CHATML
    encoded = encode(Examples({"messages": [talk("the film", "was great", "the book", "was dull", "and"), talk("a")]}))
    assert len(encoded) == 1
    whole, counted = parts(loaded.processor, encoded[0])
    ask = "[CLS] [UNK]"
    assert whole == (f"{ask} the film [SEP] a {ask} was great [SEP] a {ask} the book [SEP] a {ask} was dull [SEP]")
    assert counted == "was great [SEP] was dull [SEP]"
    assert encoded.columns["reference"] == ["was great"]


def test_prompts_go_through_the_template_on_request(ready):
    _, loaded, encode = ready
    with pytest.raises(DataProblem, match="no chat template"):
        encode(examples(), "data.chat_template=true")
    loaded.processor.chat_template = CHATML
    encoded = encode(examples(), "data.chat_template=true")
    assert parts(loaded.processor, encoded[0])[0] == "[CLS] [UNK] the film was [SEP] a [CLS] [UNK] great [SEP]"


def test_a_template_that_rewrites_earlier_answers_leaves_the_last_to_learn(ready):
    _, loaded, encode = ready
    loaded.processor.chat_template = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }} {% else %}here {% endif %}"
        "{% endfor %}"
    )
    encoded = encode(Examples({"messages": [talk("the film", "was great", "the book", "was dull")]}))
    assert parts(loaded.processor, encoded[0]) == ("the film here the book was dull [SEP]", "was dull [SEP]")
    assert encoded.columns["reference"] == ["was dull"], "what the prompt asks for"
    loaded.processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataProblem, match="does not take conversation 1") as caught:
        encode(Examples({"messages": [talk("a", "b")]}))
    assert "roles must alternate" in caught.value.why


# What is cut and left out


def test_long_prompts_are_left_out_and_long_responses_cut_aloud(ready):
    _, loaded, encode = ready
    run = Run(reporter=Heard())
    rows = [*ROWS, ("the " * 20, "great"), ("was", "very " * 20), ("", "")]
    encoded = encode(examples(rows), "data.max_length=8", run=run)
    assert encoded.lengths.tolist() == [6, 8, 8, 8, 2]
    assert all(row.any() for row in encoded.columns["counted"])
    assert parts(loaded.processor, encoded[1])[1] == "it was awful"
    assert run.reporter.lines == [
        "1 of 6 rows left out, whose prompts have 8 tokens or more (data.max_length, data.long_prompts)",
        "2 of 6 responses cut on the right at 8 tokens",
    ]


def test_long_prompts_can_be_cut_on_the_left(ready):
    _, loaded, encode = ready
    run = Run(reporter=Heard())
    rows = [("a " * 20 + "film was", "great"), ("a " * 20 + "film was", "very " * 20)]
    encoded = encode(examples(rows), "data.max_length=8", "data.long_prompts=cut", run=run)
    assert parts(loaded.processor, encoded[0]) == ("[CLS] a a a film was great [SEP]", "great [SEP]")
    assert parts(loaded.processor, encoded[1]) == ("[CLS] a film was very very very very", "very very very very")
    assert run.reporter.lines[0] == "2 of 2 prompts cut on the left to 8 tokens with the response"
    for length in range(2, 9):
        encoded = encode(examples(rows), f"data.max_length={length}", "data.long_prompts=cut")
        assert all(row.any() and not row[0] for row in encoded.columns["counted"])
        assert encoded.lengths.tolist() == [length, length]


def test_nothing_left_is_an_error_with_the_reason(ready):
    _, _, encode = ready
    with pytest.raises(DataProblem, match="none of 3 rows") as caught:
        encode(examples(), "data.max_length=3")
    assert "3 have a prompt of 3 tokens or more" in caught.value.why
    assert "data.long_prompts=cut" in caught.value.hint


# Columns


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, {"prompt": "prompt", "response": "completion"}),
        ({"question": "a", "answer": "b", "id": "c"}, {"prompt": "question", "response": "answer"}),
        (
            {"instruction": "a", "input": "b", "output": "c"},
            {"prompt": "instruction", "input": "input", "response": "output"},
        ),
        ({"text": "a"}, {"text": "text"}),
        ({"conversations": [{"from": "human", "value": "a"}]}, {"messages": "conversations"}),
    ],
)
def test_columns_are_guessed(tmp_path, row, expected):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [row] * 3)
    found = get_data(load_config("distill", None, [], {"data.source": str(path)}), TASKS.get(NAME)(), Run())
    assert found.roles == expected
    if "messages" in expected:
        assert found.train.columns["messages"][0] == [{"role": "user", "content": "a"}]


def test_doubt_and_mistakes_are_one_line(tmp_path):
    def load(row, *overrides):
        path = tiny.write_rows(tmp_path / "rows.jsonl", [row] * 3)
        return get_data(load_config("distill", None, overrides, {"data.source": str(path)}), TASKS.get(NAME)(), Run())

    both = {"text": "a", "prompt": "b", "response": "c"}
    with pytest.raises(DataProblem, match="could be read as text or as prompt and response") as caught:
        load(both)
    assert "data.prompt=prompt" in caught.value.hint
    assert load(both, "data.text=text").roles == {"text": "text"}
    assert load(both, "data.prompt=text").roles == {"prompt": "text", "response": "response"}
    with pytest.raises(DataProblem, match=r"data.text and data.prompt are for different forms"):
        load(both, "data.text=text", "data.prompt=prompt")
    with pytest.raises(DataProblem, match="no column looks like 'response'"):
        load({"prompt": "b", "x": 1}, "data.prompt=prompt")
    with pytest.raises(DataProblem, match=r"a message in row 1 .* no role or no text"):
        load({"messages": [{"role": "user", "content": None}]})
    with pytest.raises(DataProblem, match="row 2 of it holds no messages"):
        conversations([talk("a"), []], "it")


# A whole run


def test_a_run_on_prompts(models, data, tmp_path):
    options = {
        "teacher.model": str(models("llama")),
        "student.model": "layers:2",
        "data.source": str(data("prompts")),
        "method.name": "kd",
        "output.folder": str(tmp_path / "out"),
        "train.max_steps": 4,
        "train.batch_size": 4,
        "eval.latency_repeats": 1,
        "output.plots": False,
        "eval.reload": False,
    }
    result = distill(load_config("distill", None, [], options))
    assert set(result.proof.student.metrics) == {"loss", "perplexity", "token-accuracy", "agreement"}
    assert set(result.proof.teacher.metrics) == {"loss", "perplexity", "token-accuracy"}
