"""One text in the tokens of two tokenizers, and where they meet."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from kdtool.config import load_config
from kdtool.data.examples import Examples
from kdtool.errors import DataProblem
from kdtool.models import load_model
from kdtool.pipelines.setup import encode, get_data, load_processor
from kdtool.registry import TASKS
from kdtool.run import Run
from kdtool.sections import DataSection
from kdtool.tasks._base import LABELS, view_of
from kdtool.tasks._spans import GROUPS, encode_apart, matched, same_tokens
from tests import tiny


@pytest.fixture(scope="module")
def tokenizers(models):
    return [AutoTokenizer.from_pretrained(models(name)) for name in ("llama", "llama-bytes")]


def texts_of(row, tokenizers):
    """What each group stands for, in the words of both tokenizers."""
    found = []
    for prefix, tokenizer, first in zip(("", "teacher0."), tokenizers, (0, 2), strict=True):
        ids = row[f"{prefix}input_ids"]
        found.append([tokenizer.decode(ids[g[first] : g[first + 1]]).strip() for g in row[GROUPS]])
    return found


def test_groups_are_the_same_text_in_both(tokenizers):
    rows = Examples({"text": ["the film was great", "this very dull book", "it"]})
    made = encode_apart(rows, tokenizers, [64, 64], DataSection(), Run())
    for number, text in enumerate(rows.columns["text"]):
        own, theirs = texts_of(made[number], tokenizers)
        assert own[:-1] == theirs[:-1] == text.split()
        assert (own[-1], theirs[-1]) == ("[SEP]", "</s>")
        groups = made[number][GROUPS]
        assert (groups[1:, ::2] == groups[:-1, 1::2]).all()  # groups follow each other without a gap
        assert (groups[:, 0] > 0).all()


def test_parts_of_a_character_close_no_group(models):
    tokenizer = AutoTokenizer.from_pretrained(models("llama-bytes"))
    rows = Examples({"text": ["a \u00e9\u4e2d"]})
    made = encode_apart(rows, [tokenizer, tokenizer], [64, 64], DataSection(), Run())
    ids, groups = made[0]["input_ids"], made[0][GROUPS]
    whole = [tokenizer.decode(ids[g[0] : g[1]]) for g in groups[:-1]]
    assert "".join(whole) == "a \u00e9\u4e2d"
    assert "\ufffd" not in "".join(whole)
    assert (groups[:, 1] - groups[:, 0]).max() == 3


def test_prompts_are_in_no_group_and_long_rows_are_cut(tokenizers):
    rows = Examples({"prompt": ["this book"] * 2, "response": ["was very great", "it was the usual dull meal we saw"]})
    made = encode_apart(rows, tokenizers, [8, 64], DataSection(), Run())
    own, theirs = texts_of(made[0], tokenizers)
    assert own[:-1] == theirs[:-1] == ["was", "very", "great"]
    own, theirs = texts_of(made[1], tokenizers)
    assert own == theirs == ["it", "was", "the", "usual", "dull"]


def test_rows_without_anything_in_common_are_left_out(tokenizers):
    said = SimpleNamespace(warn=lambda message: said.messages.append(message), messages=[])
    rows = Examples({"prompt": ["a", "a"], "response": ["film", ""]})
    with pytest.raises(DataProblem, match="no row has text"):
        encode_apart(rows.select([0]), tokenizers, [2, 2], DataSection(), Run(reporter=said))


def test_tokens_are_compared_by_what_they_stand_for(tokenizers):
    words, parts = tokenizers
    assert same_tokens(words, words)
    assert not same_tokens(words, parts)
    own, theirs = matched(words, parts)
    assert len(own) > 3
    assert (words.eos_token_id, parts.eos_token_id) in set(zip(own.tolist(), theirs.tolist(), strict=True))
    for a, b in zip(own, theirs, strict=True):
        if a != words.eos_token_id:
            assert words.convert_ids_to_tokens(int(a)) == parts.decode([int(b)])
    assert len(np.unique(own)) == len(own)


def test_a_longer_vocabulary_with_the_same_beginning_is_the_same(models, tmp_path):
    one = AutoTokenizer.from_pretrained(models("llama"))
    longer = AutoTokenizer.from_pretrained(models("llama"))
    longer.add_tokens(["extra"])
    assert same_tokens(one, longer)
    tiny.save_bert_tokenizer(tmp_path, reverse=True)
    assert not same_tokens(one, AutoTokenizer.from_pretrained(tmp_path))


def loaded(models, names, config):
    task, found = TASKS.get("causal-lm")(), []
    for name in names:
        one = load_model(str(models(name)), task.auto_class, Run(offline=True))
        load_processor(one, task, Run(offline=True))
        found.append(one)
    return task, found, get_data(config, task, Run(offline=True))


def test_batches_hold_both_and_other_methods_are_refused(models, data):
    def pair(method):
        options = {"data.source": str(data("prompts")), "method.name": method}
        config = load_config("distill", None, ["data.task=causal-lm"], options)
        task, (student, teacher), rows = loaded(models, ("llama-small", "llama-bytes"), config)
        return task, encode(task, rows, student, teacher, config, Run(offline=True)).train

    with pytest.raises(DataProblem, match="different tokenizers") as caught:
        pair("kd")
    assert "--method span-kd or uld" in caught.value.hint
    task, rows = pair("uld")
    batch = task.collate([rows[0], rows[1]])
    other = view_of(batch, 0)
    assert other.keys() == {"input_ids", "attention_mask", LABELS}
    assert len(batch[GROUPS]) == len(rows[0][GROUPS]) + len(rows[1][GROUPS])
    assert torch.equal(batch[GROUPS][:, 0].unique(), torch.tensor([0, 1]))
    for row, b, e, b_t, e_t in batch[GROUPS].tolist():
        assert (batch[LABELS][row, b:e] >= 0).all()
        assert (other[LABELS][row, b_t:e_t] >= 0).all()
    assert task.packed(rows, []) is None
