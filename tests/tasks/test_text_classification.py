"""Sentences and pairs: padding, pairs, lengths, other tokenizers, class names."""

import numpy as np
import pytest
import torch

from kdtool.config import load_config
from kdtool.data.examples import DataSplits, Examples
from kdtool.errors import ConfigProblem, DataProblem, ModelProblem
from kdtool.models import load_model
from kdtool.pipelines.distill import get_ready
from kdtool.pipelines.setup import encode, load_processor, processor_key
from kdtool.registry import METHODS
from kdtool.run import Run
from tests import tiny

TEXTS = ["the film was great", "bad", "a meal that was dull and slow it was very plain here", "we saw it"]
PAIRS = ["it was warm", "the book and the film", "very", "here it is"]
NAME = "text-classification"


def rows_of(pairs=False):
    columns = {"text": TEXTS, "label": np.array([1, 0, 0, 2])}
    return Examples(columns | ({"text_pair": PAIRS} if pairs else {}))


@torch.no_grad()
def logits_of(task, model, encoded, rows):
    batch = task.collate([encoded[i] for i in rows])
    return task.forward(model, batch)


@pytest.mark.parametrize("pairs", [False, True])
def test_padding_does_not_change_logits(opened, config, pairs):
    task, loaded = opened(NAME, "bert")
    encoded = task.encode(rows_of(pairs), loaded, config(), Run())
    together = logits_of(task, loaded.model, encoded, range(4))
    for i in range(4):
        alone = logits_of(task, loaded.model, encoded, [i])
        torch.testing.assert_close(together.logits[i : i + 1], alone.logits, rtol=1e-5, atol=1e-5)
    assert together.labels.tolist() == [1, 0, 0, 2]


@pytest.mark.parametrize("pairs", [False, True])
def test_inputs_are_those_of_the_tokenizer(opened, config, pairs):
    task, loaded = opened(NAME, "bert")
    encoded = task.encode(rows_of(pairs), loaded, config(), Run())
    batch = task.collate([encoded[i] for i in range(4)])
    expected = loaded.processor(TEXTS, PAIRS if pairs else None, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert encoded.lengths.tolist() == expected["attention_mask"].sum(1).tolist()
    if pairs:
        assert torch.equal(batch["token_type_ids"], expected["token_type_ids"])
        assert batch["token_type_ids"].any()
        assert (batch["input_ids"] == 3).sum(1).tolist() == [2] * 4


def test_a_pair_is_not_one_sentence_nor_its_reverse(opened, config):
    task, loaded = opened(NAME, "bert")
    encoded = task.encode(rows_of(True), loaded, config(), Run())
    turned = Examples({"text": PAIRS, "text_pair": TEXTS, "label": np.zeros(4, dtype=np.int64)})
    other = task.encode(turned, loaded, config(), Run())
    joined = Examples({"text": [f"{a} {b}" for a, b in zip(TEXTS, PAIRS, strict=True)]})
    single = task.encode(joined, loaded, config(), Run())
    logits = [logits_of(task, loaded.model, rows, range(4)).logits for rows in (encoded, other, single)]
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)


def test_long_texts_are_cut(opened, config):
    task, loaded = opened(NAME, "bert")
    long = Examples({"text": ["the film " * 50], "text_pair": ["it was " * 50], "label": np.array([0])})
    assert task.encode(long, loaded, config(), Run()).lengths.tolist() == [32]
    assert task.encode(long, loaded, config("data.max_length=9"), Run()).lengths.tolist() == [9]
    with pytest.raises(ConfigProblem, match=r"data.max_length=33.*at most 32"):
        task.encode(long, loaded, config("data.max_length=33"), Run())


def test_evaluation_does_not_depend_on_batches_and_keeps_the_order(opened, config):
    task, loaded = opened(NAME, "bert")
    encoded = task.encode(rows_of(), loaded, config(), Run())
    found = [task.evaluate(loaded.model, encoded, Run(), ["accuracy", "nll"], size) for size in (1, 3, 64)]
    naive = torch.cat([logits_of(task, loaded.model, encoded, [i]).logits for i in range(4)])
    for one in found:
        np.testing.assert_allclose(one.logits, naive.numpy(), rtol=1e-4, atol=1e-5)
        assert one.metrics["accuracy"] == (naive.argmax(1).numpy() == [1, 0, 0, 2]).mean()
        assert one.labels.tolist() == [1, 0, 0, 2]
        assert one.examples == 4
    expected = torch.nn.functional.cross_entropy(naive, torch.tensor([1, 0, 0, 2]))
    assert found[1].metrics["nll"] == pytest.approx(float(expected), rel=1e-5)


def test_teacher_and_student_with_other_tokenizers_see_their_own_inputs(opened, config, tmp_path):
    task, student = opened(NAME, "bert-small")
    tiny.bert(tmp_path, layers=2, seed=5)
    tiny.save_bert_tokenizer(tmp_path, reverse=True)
    teacher = load_model(str(tmp_path), task.auto_class, Run())
    load_processor(teacher, task, Run())
    assert processor_key(teacher.processor) != processor_key(student.processor)
    data = DataSplits(rows_of(), None, rows_of(), tiny.LABELS, {})
    encoded = encode(task, data, student, teacher, config(), Run()).train
    batch = task.collate([encoded[i] for i in range(4)])
    right = teacher.processor(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    own = student.processor(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    assert torch.equal(batch["teacher0.input_ids"], right["input_ids"])
    assert torch.equal(batch["input_ids"], own["input_ids"])
    assert not torch.equal(own["input_ids"], right["input_ids"])
    method = METHODS.get("kd")(METHODS.build_config("kd", {}), student, [teacher], task)
    with torch.no_grad():
        torch.testing.assert_close(method.teach(batch).logits, teacher.model(**right).logits)
        torch.testing.assert_close(task.forward(student.model, batch).logits, student.model(**own).logits)
        found = task.evaluate(teacher.model, encoded, Run(), ["nll"], 2, teacher=0)
        np.testing.assert_allclose(found.logits, teacher.model(**right).logits.numpy(), rtol=1e-4, atol=1e-5)
    inputs = task.example_inputs(encoded, 4, teacher=0)
    assert torch.equal(inputs["input_ids"], right["input_ids"])
    assert set(task.example_inputs(encoded, 4)) == {"input_ids", "attention_mask"}


def test_equal_tokenizers_share_inputs(opened, config):
    task, student = opened(NAME, "bert-small")
    _, teacher = opened(NAME, "bert")
    data = DataSplits(rows_of(), None, rows_of(), tiny.LABELS, {})
    encoded = encode(task, data, student, teacher, config(), Run()).train
    assert not any(name.startswith("teacher") for name in encoded.columns)


# Class names from data to teacher to student


def distillation(models, data, teacher, *overrides):
    options = {
        "teacher.model": str(models(teacher)),
        "student.model": "layers:1",
        "data.source": str(data("text")),
        "method.name": "kd",
    }
    return load_config("distill", None, overrides, options)


def test_permuted_class_names_are_refused(models, data):
    with pytest.raises(DataProblem, match="class 0 is 'bad' in the data and 'so so'") as caught:
        get_ready(distillation(models, data, "bert-permuted"), Run())
    assert "by-name" in caught.value.hint


@pytest.mark.parametrize("label_map", ["by-name", "{bad: bad, good: good, so so: so so}"])
def test_permuted_class_names_are_mapped_by_name(models, data, label_map):
    ready = get_ready(distillation(models, data, "bert-permuted", f"data.label_map={label_map}"), Run())
    order = ["so so", "bad", "good"]
    assert ready.data.labels == ready.teacher.labels == ready.student.labels == order
    raw = tiny.text_rows(12, 2)
    assert [order[i] for i in ready.encoded.test.columns["labels"]] == [row["label"] for row in raw]
    model, tokenizer = ready.teacher.model, ready.teacher.processor
    with torch.no_grad():
        said = [order[int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax())] for row in raw]
    expected = np.mean([name == row["label"] for name, row in zip(said, raw, strict=True)])
    found = ready.task.evaluate(model, ready.encoded.test, Run(), ["accuracy"], 5, 0)
    assert found.metrics["accuracy"] == pytest.approx(expected)
    naive = np.mean([tiny.LABELS.index(row["label"]) == order.index(name) for name, row in zip(said, raw, strict=True)])
    assert naive != expected, "the case does not show what it should"


def test_a_student_with_other_class_names_is_refused(models, data):
    config = distillation(models, data, "bert")
    config.student.model = str(models("bert-permuted"))
    with pytest.raises(ModelProblem, match="numbers other classes than the teacher") as caught:
        get_ready(config, Run())
    assert "init=random" in caught.value.hint


def test_freeze_patterns(models, data):
    config = distillation(models, data, "bert", "student.freeze=[embeddings, '*.layer.0.attention.*']")
    named = dict(get_ready(config, Run()).student.model.named_parameters())
    frozen = {name for name, parameter in named.items() if not parameter.requires_grad}
    assert frozen == {name for name in named if ".embeddings." in name or ".layer.0.attention." in name}
    assert all(named[name].kept_frozen for name in frozen)
    with pytest.raises(ConfigProblem, match=r"student.freeze: '\*.layer.7.\*' names no parameter") as caught:
        get_ready(distillation(models, data, "bert", "student.freeze=['*.layer.7.*']"), Run())
    assert "bert.embeddings" in caught.value.hint


def test_random_start_takes_nothing_from_the_weights(models, data):
    drawn, kept = (
        get_ready(distillation(models, data, "bert", f"student.init={init}"), Run()).student
        for init in ("random", "auto")
    )
    again = get_ready(distillation(models, data, "bert", "student.init=random"), Run()).student
    assert drawn.facts["new_weights"] == ["all"]
    left, right, same = (
        one.model.state_dict()["bert.encoder.layer.0.output.dense.weight"] for one in (drawn, kept, again)
    )
    assert not torch.equal(left, right)
    assert torch.equal(left, same)
