"""Packed rows: examples do not see each other, and a batch gives what its single rows give."""

import numpy as np
import pytest
import torch
import transformers

from kdtool.config import load_config
from kdtool.data.examples import Examples
from kdtool.errors import UsageProblem
from kdtool.pipelines.distill import get_ready
from kdtool.run import Run
from kdtool.tasks._packing import POSITIONS, examples_of, joined, keeps_apart, packable
from tests.kits import gradients, make_kit

NAME = "causal-lm"


@pytest.fixture(scope="module")
def kit(models, data):
    return make_kit(NAME, models, data, "prompts")


def chosen(kit):
    """Short rows, which share a line, and the longest."""
    order = np.argsort(kit.train.lengths, kind="stable")
    return [*order[:4].tolist(), int(order[-1]), int(order[4])]


def together(kit):
    packed = packable(kit.train)
    return kit.task.collate([packed[i] for i in chosen(kit)])


def test_examples_keep_their_order_and_share_rows():
    items = [{POSITIONS: np.arange(n), "x": np.full(n, n)} for n in (2, 3, 5, 1, 4, 2)]
    assert [row["x"].tolist() for row in joined(items, ["x"])] == [[2, 2, 3, 3, 3], [5] * 5, [1, 4, 4, 4, 4], [2, 2]]


def test_positions_start_anew_at_each_example_and_at_the_padding(kit):
    batch = together(kit)
    assert len(batch["input_ids"]) < len(chosen(kit))
    lengths = kit.train.lengths[chosen(kit)]
    owners = examples_of(batch)
    assert torch.bincount(owners[owners >= 0]).tolist() == lengths.tolist()
    for i, length in enumerate(lengths):
        assert batch[POSITIONS][owners == i].tolist() == list(range(length))
        assert batch["input_ids"][owners == i].tolist() == kit.train[chosen(kit)[i]]["input_ids"].tolist()
    for row, mask in zip(batch[POSITIONS], batch["attention_mask"], strict=True):
        assert row[mask == 0].tolist() == list(range(int((mask == 0).sum())))
    alone = [int(kit.task.units(kit.task.collate([kit.train[i]]))) for i in chosen(kit)]
    assert kit.task.units(batch).tolist() == alone


@pytest.mark.parametrize("name", ["none", "kd"])
def test_loss_and_gradient_of_a_packed_batch_are_those_of_its_single_rows(kit, name):
    method, other = kit.build(name).eval(), kit.build(name).eval()
    whole = method(together(kit), 0.5)
    whole.total.backward()
    singles = [other(kit.task.collate([kit.train[i]]), 0.5) for i in chosen(kit)]
    sum(one.total for one in singles).backward()
    assert int(whole.count) == sum(int(one.count) for one in singles)
    torch.testing.assert_close(whole.total, sum(one.total for one in singles), rtol=1e-5, atol=1e-5)
    expected = gradients(other)
    for key, gradient in gradients(method).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_changing_one_example_leaves_the_others_bit_identical(kit):
    batch = together(kit)
    before = kit.task.forward(kit.student.model, batch)
    owners = examples_of(batch)
    changed = dict(batch)
    changed["input_ids"] = torch.where(owners == 1, (batch["input_ids"] + 1) % 20, batch["input_ids"])
    after = kit.task.forward(kit.student.model, changed)
    counts = kit.task.units(batch)
    own = torch.arange(len(counts)).repeat_interleave(counts) == 1
    assert owners[0].max() == 1, "the changed example shares its row"
    assert torch.equal(before.logits[~own], after.logits[~own])
    assert not torch.equal(before.logits[own], after.logits[own])


class Mixing(torch.nn.Module):
    """A model that adds up all it has read: examples side by side see each other."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(20, 8)

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, position_ids=None, use_cache=False):
        states = self.table(input_ids).cumsum(1)
        return transformers.modeling_outputs.CausalLMOutput(logits=states @ self.table.weight.T)


def test_models_that_mix_examples_are_found_out(kit):
    assert keeps_apart(kit.student.model)
    assert not keeps_apart(Mixing())
    alibi = transformers.BloomConfig(vocab_size=20, hidden_size=8, n_layer=1, n_head=2)
    assert not keeps_apart(transformers.BloomForCausalLM(alibi))
    gpt = transformers.GPT2Config(vocab_size=20, n_positions=32, n_embd=8, n_layer=1, n_head=2)
    assert keeps_apart(transformers.GPT2LMHeadModel(gpt))


def test_texts_are_rows_of_their_own_on_request(opened, config):
    task, loaded = opened(NAME, "llama-small")
    rows = Examples({"text": ["the film", "was it very very very very good", ""]})
    encoded = task.encode(rows, loaded, config("data.packing=true", "data.max_length=4"), Run())
    words = [" ".join(loaded.processor.convert_ids_to_tokens(ids.tolist())) for ids in encoded.columns["input_ids"]]
    assert words == ["[CLS] the film [SEP]", "[CLS] was it very", "very very very [UNK]", "[CLS] [SEP]"]
    assert [row.tolist() for row in encoded.columns["counted"]][1] == [False, True, True, True]
    found = task.evaluate(loaded.model, encoded, Run(), task.metrics, 2)
    assert found.metrics == pytest.approx(task.evaluate(loaded.model, encoded, Run(), task.metrics, 4).metrics)


@pytest.mark.parametrize(
    ("method", "source", "wanted", "packs"),
    [
        ("kd", "prompts", None, True),
        ("kd", "prompts", False, False),
        ("kd", "plain", None, False),
        ("kd", "plain", True, True),
        ("gkd", "plain", None, False),
        ("gkd", "plain", True, UsageProblem),
    ],
)
def test_rows_are_packed_where_the_method_does_not_generate(models, data, method, source, wanted, packs):
    options = {"teacher.model": str(models("llama")), "student.model": "layers:1", "method.name": method}
    options |= {"data.source": str(data(source)), "data.packing": wanted, "data.task": NAME, "data.max_length": 32}
    config = load_config("distill", None, [], options)
    if packs is UsageProblem:
        with pytest.raises(UsageProblem, match="gkd needs every example in a row of its own"):
            get_ready(config, Run())
        return
    encoded = get_ready(config, Run()).encoded
    assert (POSITIONS in encoded.train.columns) == packs
    assert POSITIONS not in encoded.test.columns
