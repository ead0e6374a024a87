"""Masked language models: masks by seed, row and view, and exact figures."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdtool.config import load_config
from kdtool.data.examples import Examples
from kdtool.errors import ConfigProblem, DataProblem, ModelProblem
from kdtool.pipelines.distill import distill, get_ready
from kdtool.pipelines.setup import make_run, pick_task
from kdtool.run import Run, Silent
from kdtool.sections import AugmentSection
from kdtool.tasks._masking import Masks
from tests import tiny

NAME = "masked-lm"
TEXTS = [row["text"] for row in tiny.text_rows(20, 9)]


@pytest.fixture
def ready(opened, config):
    task, loaded = opened(NAME, "masked-small")

    def call(*overrides, texts=TEXTS):
        return task.encode(Examples({"text": texts}), loaded, config(*overrides), Run())

    return task, loaded, call


def test_masks_have_the_published_shares():
    masks = Masks(0.15, 4, np.arange(5, 1005), 0)
    ids, free = np.full(400, 2000), np.arange(400) >= 100
    rows = [masks(ids, free, number) for number in range(50)]
    chosen = np.stack([places for _, places in rows])
    assert (chosen.sum(1) == 45).all()
    assert not chosen[:, :100].any()
    made = np.stack([row for row, _ in rows])
    assert (made[~chosen] == 2000).all()
    shares = [float(np.mean(made[chosen] == value)) for value in (4, 2000)]
    assert shares[0] == pytest.approx(0.8, abs=0.03)
    assert shares[1] == pytest.approx(0.1, abs=0.03)
    hit = chosen[:, 100:].mean(0)
    assert hit.min() > 0
    assert hit.max() < 0.4
    again = masks(ids, free, 7)
    assert np.array_equal(again[0], rows[7][0])
    assert not np.array_equal(Masks(0.15, 4, np.arange(5, 1005), 1)(ids, free, 7)[0], again[0])
    tiny_row = masks(np.array([9, 8, 7]), np.array([False, True, False]), 3)
    assert tiny_row[1].tolist() == [False, True, False]


def test_masks_depend_on_row_and_epoch_and_not_on_the_batch(ready):
    task, _, encode = ready
    encoded = encode("data.mask_share=0.3")
    views = task.views(encoded, AugmentSection())
    whole = views.batch(views.numbers(range(20), 0), "cpu")
    assert torch.equal(whole["labels"], task.collate([encoded[i] for i in range(20)])["labels"])
    for rows in ([3], [19, 4], [7, 8, 9]):
        part = views.batch(views.numbers(rows, 0), "cpu")
        for place, row in enumerate(rows):
            width = part["input_ids"].shape[1]
            assert torch.equal(part["input_ids"][place], whole["input_ids"][row][:width])
            assert torch.equal(part["labels"][place], whole["labels"][row][:width])
    later = views.batch(views.numbers(range(20), 1), "cpu")
    assert not torch.equal(later["labels"], whole["labels"])
    assert torch.equal((later["labels"] != -100).sum(1), (whole["labels"] != -100).sum(1))
    in_turn = task.views(encoded, AugmentSection(views=2))
    assert torch.equal(in_turn.batch(in_turn.numbers(range(20), 2), "cpu")["labels"], whole["labels"])
    picked = encoded.select([5, 2])
    assert torch.equal(task.collate([picked[0]])["input_ids"], task.collate([encoded[5]])["input_ids"])


@torch.no_grad()
def test_figures_count_masked_tokens_whatever_the_batch(ready):
    task, loaded, encode = ready
    encoded = encode()
    losses, hits = [], []
    for i in range(len(encoded)):
        batch = task.collate([encoded[i]])
        logits = loaded.model.eval()(input_ids=batch["input_ids"]).logits[0]
        for place in torch.nonzero(batch["labels"][0] != -100)[:, 0]:
            truth = encoded[i]["input_ids"][int(place)]
            assert truth == batch["labels"][0, place]
            losses.append(float(logits[place].double().logsumexp(0) - logits[place, truth]))
            hits.append(int(logits[place].argmax()) == truth)
    for size in (1, 3, 64):
        found = task.evaluate(loaded.model, encoded, Run(), ["loss", "token-accuracy"], size)
        assert found.metrics == pytest.approx({"loss": np.mean(losses), "token-accuracy": np.mean(hits)}, rel=1e-5)
    assert task.example_inputs(encoded, 3).keys() == {"input_ids", "attention_mask"}


def test_long_texts_come_in_parts_and_unknown_ones_not_at_all(ready):
    _, loaded, encode = ready
    encoded = encode("data.max_length=6", texts=["the film was great and we saw it here", "xyz xyz"])
    assert [len(row) for row in encoded.columns["input_ids"]] == [6, 5]
    assert all(row[-1] == 3 for row in encoded.columns["input_ids"])
    with pytest.raises(DataProblem, match="texts are empty"):
        encode(texts=["xyz"])
    loaded.processor.mask_token = None
    with pytest.raises(ModelProblem, match="no mask token"):
        encode()


def options_of(models, data, folder, **more):
    return {
        "teacher.model": str(models("masked")),
        "student.model": "layers:2",
        "data.source": str(data("plain")),
        "method.name": "kd",
        "output.folder": str(folder),
        "train.batch_size": 8,
        "eval.latency": False,
        "eval.reload": False,
        "output.plots": False,
        **more,
    }


class Stop(Silent):
    """Interrupts once, at the first step that is a multiple of `at`."""

    def __init__(self, at):
        self.at = at

    def progress(self, stage, done, total, facts):
        if stage == "train" and done == self.at:
            raise KeyboardInterrupt


def test_a_resumed_run_goes_on_with_the_same_masks(models, data, tmp_path):
    settings = {"train.max_steps": 8, "train.checkpoint_every": 4, "train.log_every": 2}
    whole = load_config("distill", None, [], options_of(models, data, tmp_path / "whole", **settings))
    distill(whole)
    config = load_config("distill", None, [], options_of(models, data, tmp_path / "cut", **settings))
    with pytest.raises(KeyboardInterrupt):
        distill(config, make_run(config, Stop(6)))
    distill(load_config("distill", None, [], options_of(models, data, tmp_path / "cut", **settings)))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_the_task_is_that_of_the_architecture_unless_classes_are_named(models, data):
    config = load_config("distill", None, [], {"data.source": str(data("text"))})
    assert pick_task(config, str(models("masked")), Run(offline=True)).name == NAME
    config = load_config("distill", None, ["data.label=label"], {"data.source": str(data("text"))})
    assert pick_task(config, str(models("masked")), Run(offline=True)).name == "text-classification"


def test_training_sees_new_masks_in_each_epoch(models, data, tmp_path):
    ready = get_ready(load_config("distill", None, [], options_of(models, data, tmp_path)), Run())
    rows = range(8)
    first, second = (ready.views.batch(ready.views.numbers(rows, epoch), "cpu")["input_ids"] for epoch in (0, 1))
    assert not torch.equal(first, second)


def test_a_teacher_cache_holds_views_of_masks_and_knows_them(models, data, tmp_path):
    settings = {"train.max_steps": 10, "augment.views": 2, "train.teacher_cache": False}
    distill(load_config("distill", None, [], options_of(models, data, tmp_path / "asked", **settings)))
    settings |= {"train.teacher_cache": True, "train.teacher_cache_dir": str(tmp_path / "cache")}
    for name in ("cold", "warm"):
        distill(load_config("distill", None, [], options_of(models, data, tmp_path / name, **settings)))
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("asked", "cold", "warm")]
    for key, value in weights[0].items():
        # biases of keys have no gradient but rounding, which AdamW blows up; ten steps move others by 5e-3
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=5e-4)
        assert torch.equal(weights[1][key], weights[2][key])
    for other in ({"augment.seed": 1}, {"data.mask_share": 0.3}):
        with pytest.raises(ConfigProblem, match="made for another run") as caught:
            distill(load_config("distill", None, [], options_of(models, data, tmp_path / "other", **settings | other)))
        assert "views" in caught.value.why
