"""Methods that write, with encoders and decoders: prompts are sources, rows are what the decoder sees."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from kdtool.data.examples import Examples
from kdtool.divergences import Divergence, TopK, divergence, head_of
from kdtool.errors import TrainingProblem
from kdtool.registry import METHODS
from kdtool.run import Run, Silent
from kdtool.sections import TrainSection
from kdtool.tasks._base import LABELS, ROWS, VIEW
from kdtool.train.loop import Trainer
from kdtool.train.state import seed_everything
from tests.kits import make_kit

WRITERS = ["distillm", "gkd", "imitkd", "mixed-skd", "on-policy", "seqkd", "skd"]
ALWAYS = {"gkd": "student_share", "imitkd": "student_share", "mixed-skd": "skd_share", "distillm": "student_share"}
"""Settings that make a method write in every step."""
FEW = {"k": 4, "student_temperature": 1.0, "student_top_p": 1.0}
"""Settings by which some proposals are rejected."""


@pytest.fixture(scope="module")
def kits(models, data):
    return {
        "t5": make_kit("seq2seq-lm", models, data),
        "bart": make_kit("seq2seq-lm", models, data, pair=("bart", "bart-small")),
    }


@pytest.fixture(params=["t5", "bart"])
def kit(request, kits):
    return kits[request.param]


def build(kit, name, **values):
    seed_everything(3)
    if name in ALWAYS:
        values.setdefault(ALWAYS[name], 1.0)
    return kit.build(name, **values).eval()


def learnt(method, batch, monkeypatch):
    """The text that a step learns from."""
    seen, plain = [], method.learn
    with monkeypatch.context() as patched:
        patched.setattr(method, "learn", lambda text, **how: (seen.append(text), plain(text, **how))[1])
        method.step(batch, 0.5)
    return seen[0]


@pytest.mark.parametrize("name", WRITERS)
def test_texts_are_written_from_their_sources_whatever_the_batch(kit, name, monkeypatch):
    method = build(kit, name, **(FEW if name.endswith("skd") else {}), max_new_tokens=8)
    rows = [0, 5, 2, 9]
    batch = kit.batch(rows)
    assert batch["attention_mask"].sum(1).unique().numel() > 1, "sources of one length show nothing"
    text = learnt(method, batch, monkeypatch)
    begun = len(method.opening)
    assert text.ids[:, :begun].tolist() == [method.opening] * 4
    assert not text.counts[:, :begun].any()
    assert text.source.ids is batch["input_ids"]
    for i, row in enumerate(rows):
        new = text.ids[i][text.counts[i]].tolist()
        assert 1 <= len(new) <= 8
        assert len(new) == 8 or new[-1] in method.stop, "the end counts"
        alone = learnt(method, kit.batch([row]), monkeypatch)
        assert new == alone.ids[0][alone.counts[0]].tolist()


def test_as_many_tokens_are_written_as_follow_in_the_data(kit):
    method = build(kit, "on-policy")
    batch = kit.batch([0, 1, 2, 3])
    first, room = method.prompts(batch)
    assert first.tolist() == [len(method.opening)] * 4
    assert room.tolist() == (kit.task.units(batch) + 1 - len(method.opening)).tolist()
    given = method.given(batch)
    assert int(given.counts.sum()) == int(kit.task.units(batch).sum())
    assert given.ids[given.counts].tolist() == batch[LABELS][batch[LABELS] != -100].tolist()


def test_responses_as_long_as_a_decoder_takes(kits):
    kit = kits["bart"]
    rows = Examples({"prompt": ["the film was", "it"], "response": ["very " * 40, "great"]})
    encoded = kit.task.encode(rows, kit.student, kit.config, Run())
    batch = kit.task.collate([encoded[0], encoded[1]]) | {ROWS: torch.tensor([0, 1])}
    assert batch[LABELS].shape[1] == kit.student.model.config.max_position_embeddings
    for name in ("supervised-kd", "on-policy", "skd", "minillm"):
        method = build(kit, name)
        method.stop = ()
        losses = method.step(batch, 0.5)
        assert torch.isfinite(losses.total)
        assert int(losses.count) >= 32


def whole(method, text, ce_weight=0.0, **values):
    """The loss from whole logits."""
    chosen = text.counts[:, 1:]
    inputs = {"input_ids": text.source.ids, "attention_mask": text.source.mask, "decoder_input_ids": text.ids[:, :-1]}
    own = method.student(**inputs).logits[chosen].double()
    with torch.no_grad():
        there = method.teacher_list[0].model(**inputs).logits[chosen].double()
    ce = functional.cross_entropy(own, text.ids[:, 1:][chosen], reduction="sum")
    return ce_weight * ce + (divergence(own, there, Divergence(**values)) if values else 0)


CASES = {
    "skd": {"kind": "forward-kl"},
    "gkd": {"kind": "jsd", "beta": 0.5},
    "distillm": {"kind": "skewed-reverse-kl", "skew": 0.1},
    "seqkd": {"ce_weight": 1.0},
    "supervised-kd": {"kind": "forward-kl", "ce_weight": 0.5},
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_whole_logits(kit, name, monkeypatch):
    """And so is its gradient, through decoder and encoder."""
    method = build(kit, name, **({"ce_weight": 0.5} if name == "supervised-kd" else {}))
    batch = kit.batch([0, 1, 2, 5])
    text = learnt(method, batch, monkeypatch)
    slopes = []
    for loss in (method.step(batch, 0.5).total, whole(method, text, **CASES[name])):
        method.zero_grad(set_to_none=True)
        loss.backward()
        slopes.append({key: p.grad for key, p in method.student.named_parameters() if p.grad is not None})
        slopes[-1]["loss"] = loss.detach().float()
    assert any("encoder" in key for key in slopes[0])
    assert slopes[0].keys() == slopes[1].keys()
    scale = max(float(value.abs().max()) for key, value in slopes[1].items() if key != "loss")
    for key, value in slopes[1].items():
        torch.testing.assert_close(slopes[0][key], value, rtol=1e-4, atol=1e-4 * scale, msg=key)


def test_a_cache_of_all_tokens_says_what_the_teacher_says(kit):
    method, batch = build(kit, "supervised-kd"), kit.batch([0, 1, 2])
    expected = method.step(batch, 0.5)
    there = method.teach(batch).logits[:, : method.vocabulary]
    method.caches[0] = SimpleNamespace(get=lambda rows: TopK.of(there, method.vocabulary))
    method.teacher_list.clear()
    found = method.step(batch | {VIEW: batch[ROWS]}, 0.5)
    torch.testing.assert_close(found.total, expected.total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*WRITERS, "supervised-kd", "minillm"])
def test_padding_never_counts(kit, name):
    method, batch = build(kit, name), kit.batch([0, 1, 2])
    wider = {key: functional.pad(value, (0, 5)) for key, value in batch.items() if key != ROWS}
    wider[LABELS][:, -5:] = -100
    wider["input_ids"][:, -5:] = wider["decoder_input_ids"][:, -5:] = 7
    first, second = (method.step(one | {ROWS: batch[ROWS]}, 0.5) for one in (batch, wider))
    assert int(first.count) == int(second.count) > 0
    torch.testing.assert_close(second.total, first.total, rtol=1e-4, atol=1e-5)


class Breaks(Silent):
    def progress(self, stage, done, total, facts):
        if done == 3:
            raise RuntimeError("cut off")


def train(kit, name, folder, checkpoints=None, reporter=None, **values):
    seed_everything(7)
    method = kit.build(name, **values)
    method.folder = folder
    config = TrainSection(max_steps=4, batch_size=4, lr=1e-2, log_every=1, checkpoint_every=2, resume=True)
    run = Run(seed=7, reporter=reporter or Silent())
    return method, Trainer(method, kit.train, config, run, folder=checkpoints).train()


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        ("t5", "skd", FEW),
        ("bart", "skd", FEW),
        ("t5", "gkd", {"seqkd": True, "student_share": 0.3}),
        ("t5", "distillm", {"student_share": 1.0, "capacity": 6}),
    ],
)
def test_a_run_that_was_cut_off_ends_like_one_that_was_not(kits, kind, name, values, tmp_path):
    kit, values = kits[kind], {**values, "save_generations": True}
    whole, history = train(kit, name, tmp_path / "whole", **values)
    with pytest.raises(RuntimeError, match="cut off"):
        train(kit, name, tmp_path / "cut", tmp_path / "checkpoints", Breaks(), **values)
    resumed, again = train(kit, name, tmp_path / "cut", tmp_path / "checkpoints", **values)
    assert history.rows == again.rows
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    kept = [(tmp_path / place / "generations.jsonl").read_text() for place in ("whole", "cut")]
    assert kept[0] == kept[1]
    for line in map(json.loads, kept[0].splitlines()):
        assert line["prompt"] == kit.train[line["row"]]["input_ids"].tolist()
        assert line["text"] == kit.student.processor.decode(line["tokens"])
    if name == "skd":
        assert all(0 < row["acceptance"] < 1 for row in history.rows)


def test_remembered_texts_keep_their_sources(kit, monkeypatch):
    method = build(kit, "distillm", capacity=6, max_new_tokens=9).train()
    pairs = {}
    for rows in ([0, 1, 2], [3, 4, 5], [6, 7]):
        text = method.sampled(kit.batch(rows), 0.5)
        method._remember(text, torch.tensor(rows))
        for i in range(len(rows)):
            new = tuple(text.ids[i][text.counts[i]].tolist())
            pairs[new] = text.source.ids[i][text.source.mask[i] == 1].tolist()
    found = method._recalled(kit.batch(list(range(20))), 0.5)
    recalled = [tuple(ids[counts].tolist()) for ids, counts in zip(found.ids, found.counts, strict=True)]
    assert len(set(recalled)) > 2
    for i, new in enumerate(recalled):
        assert found.source.ids[i][found.source.mask[i] == 1].tolist() == pairs[new]
    assert torch.isfinite(method.learn(found).total)


def test_real_text_of_minillm_may_be_other_prompts(kit, data):
    method = build(kit, "minillm", pretraining_text=str(data("prompts") / "test.jsonl"))
    assert len(method.windows) > 7, "rows longer than those of a first batch stay"
    text = method._drawn(method.windows, kit.batch([0, 1, 2]), 0.5)
    assert text.source.ids.shape[0] == 3
    assert torch.isfinite(method.step(kit.batch([0, 1, 2]), 0.5).total)


def test_what_cannot_be_is_refused(kits):
    method = kits["bart"].build("skd")
    object.__setattr__(method, "config", METHODS.build_config("skd", {"expected_seq_len": 9}))
    with pytest.raises(TrainingProblem, match="expected_seq_len counts blocks"):
        method.setup(kits["bart"].batch([0, 1]), kits["bart"].train)
    kits["t5"].build("skd", expected_seq_len=9)
    method = kits["bart"].build("skd")
    method.teacher_list[0].model.config.model_type = "prophetnet"
    with pytest.raises(TrainingProblem, match="one token at a time"):
        method.setup(kits["bart"].batch([0, 1]), kits["bart"].train)
    method = kits["t5"].build("gkd")
    method.teacher_list[0].model.config.decoder_start_token_id = 5
    with pytest.raises(TrainingProblem, match="begin with different tokens"):
        method.setup(kits["t5"].batch([0, 1]), kits["t5"].train)


def test_heads_with_a_scale_or_a_constant_give_the_logits(kits):
    assert head_of(kits["t5"].student.model).scale == 16**-0.5
    assert head_of(kits["bart"].student.model).bias is not None
    for kit in kits.values():
        batch = kit.batch([0, 1, 2])
        states, out = (call(kit.student.model, batch) for call in (kit.task.states, kit.task.forward))
        torch.testing.assert_close(states.head.logits(states.hidden), out.logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(states.labels, out.labels)
