"""WID on every family of encoders: masked and merged models agree, the identity changes nothing, runs resume."""

import copy

import pytest
import torch
import transformers as tf

from kdtool.compressors import _wid_merge as merging
from kdtool.compressors import _wid_schedule as schedule
from kdtool.compressors import _wid_step as stepping
from kdtool.compressors import wid
from kdtool.compressors._base import Context
from kdtool.compressors._wid_anatomy import anatomy_of
from kdtool.compressors._wid_method import Inheritance
from kdtool.errors import ModelProblem, UsageProblem
from kdtool.modeling import SentenceClassifier, SentenceClassifierConfig
from kdtool.models import Loaded
from kdtool.run import Run, Silent
from kdtool.sections import TrainSection
from kdtool.train.checkpoint import newest
from kdtool.train.state import seed_everything
from tests.kits import make_kit

SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
}
VIT = {"image_size": 8, "patch_size": 4, **{k: v for k, v in SIZES.items() if k not in ("vocab_size", "pad_token_id")}}
DISTIL = {"vocab_size": 30, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 20}
BERT = tf.BertConfig(**SIZES)

FAMILIES = {
    "bert": (tf.BertForMaskedLM, BERT),
    "bert-classifier": (tf.BertForSequenceClassification, BERT),
    "roberta": (tf.RobertaForMaskedLM, tf.RobertaConfig(**SIZES)),
    "roberta-classifier": (tf.RobertaForSequenceClassification, tf.RobertaConfig(**SIZES)),
    "xlm-roberta": (tf.XLMRobertaForMaskedLM, tf.XLMRobertaConfig(**SIZES)),
    "camembert": (tf.CamembertForSequenceClassification, tf.CamembertConfig(**SIZES)),
    "electra": (tf.ElectraForMaskedLM, tf.ElectraConfig(**SIZES, embedding_size=16)),
    "electra-narrow": (tf.ElectraForMaskedLM, tf.ElectraConfig(**SIZES, embedding_size=6)),
    "electra-classifier": (tf.ElectraForSequenceClassification, tf.ElectraConfig(**SIZES, embedding_size=6)),
    "distilbert": (tf.DistilBertForMaskedLM, tf.DistilBertConfig(**DISTIL)),
    "distilbert-classifier": (tf.DistilBertForSequenceClassification, tf.DistilBertConfig(**DISTIL)),
    "vit": (tf.ViTForImageClassification, tf.ViTConfig(**VIT)),
    "sentence-classifier": (SentenceClassifier, SentenceClassifierConfig(backbone_config=BERT, normalize=True)),
}
on_each_family = pytest.mark.parametrize("family", FAMILIES)
both_strategies = pytest.mark.parametrize("strategy", ["dim", "head"])


def model_of(family):
    made, config = FAMILIES[family]
    torch.manual_seed(0)
    model = made(copy.deepcopy(config)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)  # biases and norms, too, are not what they start as
    return Loaded(model, None, family)


@torch.no_grad()
def logits_of(model, family):
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return model(pixel_values=torch.randn(2, 3, 8, 8, generator=generator)).logits
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    ids = torch.randint(2, 30, (2, 9), generator=generator) * mask
    logits = model(input_ids=ids, attention_mask=mask).logits
    return logits[mask.bool()] if logits.ndim == 3 else logits


def inheritance_of(loaded, strategy, hidden=8):
    """Random compactors, and what they drop in the end."""
    anatomy = anatomy_of(loaded.model)
    config = wid.Config(hidden, strategy, steps=100)
    source = wid.untied(loaded, anatomy)
    source.model.double()
    method = Inheritance(wid.goal_of(config, anatomy), source, anatomy, None)
    torch.manual_seed(2)
    with torch.no_grad():
        for compactor in merging.compactors_of(method.student, anatomy).values():
            compactor.add_(torch.randn_like(compactor), alpha=0.2)
    method.choose(16)
    model = type(source.model)(wid.shrunk(source, config, anatomy)).double()
    model.load_state_dict(method.inherited())
    return method, model.eval()


@on_each_family
@both_strategies
def test_the_merged_model_is_the_masked_one(family, strategy, tmp_path):
    loaded = model_of(family)
    method, model = inheritance_of(loaded, strategy)
    expected = logits_of(method.masked(), family)
    torch.testing.assert_close(logits_of(model, family), expected, rtol=1e-10, atol=1e-10)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(logits_of(again, family), logits_of(model, family))
    single = logits_of(model.float(), family), logits_of(method.masked().float(), family)
    torch.testing.assert_close(*single, rtol=1e-5, atol=1e-5)
    assert (logits_of(loaded.model, family) - expected).abs().max() > 1e-3


@on_each_family
def test_identity_compactors_that_keep_all_change_nothing(family):
    loaded = model_of(family)
    wrapped = merging.compacted(loaded.model, anatomy_of(loaded.model)).eval()
    torch.testing.assert_close(logits_of(wrapped, family), logits_of(loaded.model, family), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "vit"])
def test_smaller_heads_need_the_query_factor_and_fewer_do_not(family, monkeypatch):
    monkeypatch.setattr(merging, "query_factor", lambda *_: 1.0)
    off = {}
    for strategy in ("dim", "head"):
        method, model = inheritance_of(model_of(family), strategy)
        off[strategy] = float((logits_of(method.masked(), family) - logits_of(model, family)).abs().max())
    assert off["dim"] > 100 * off["head"]


def test_one_product_and_three_agree():
    linear = merging.CompactedLinear(torch.nn.Linear(6, 10), True, True).double()
    torch.nn.init.normal_(linear.inner)
    torch.nn.init.normal_(linear.outer)
    rows = torch.randn(40, 6, dtype=torch.float64)
    torch.testing.assert_close(linear(rows), torch.cat([linear(row) for row in rows.split(1)]))


def test_the_step_of_the_optimiser_is_that_of_its_parts():
    torch.manual_seed(0)
    values, keep = {"in": torch.randn(4, 4), "out": torch.randn(4, 4), "bias": torch.randn(4)}, torch.arange(4) > 1
    parameters = {role: torch.nn.Parameter(value.clone()) for role, value in values.items()}
    grads = {role: torch.randn_like(value) for role, value in values.items()}
    roles = [(parameter, role, "hidden") for role, parameter in parameters.items()]
    other = torch.nn.Parameter(torch.ones(3))  # of the model itself: a plain step
    groups = [{"params": [*parameters.values(), other], "lr": 0.1, "weight_decay": 0.01}]
    optimizer = stepping.PenalisedAdamW(groups, roles, 20.0)
    optimizer.masks = {"hidden": keep}
    moments = {role: (torch.zeros_like(v), torch.zeros_like(v)) for role, v in values.items()}
    adam = stepping.Adam(0.1, weight_decay=0.01)
    for phase in ("warm", "active", "active"):
        optimizer.phase = phase
        for role, parameter in parameters.items():
            parameter.grad, value, moment = grads[role].clone(), values[role], moments[role]
            grad = grads[role] if role == "bias" else stepping.shrink(value, grads[role])
            if phase == "active":
                gone = stepping.dropped_entries(keep, role)
                grad = stepping.penalise(value, grads[role], moment[0], gone, 20.0)
            stepping.step(value, grad, *moment, adam)
        other.grad = torch.ones(3)
        optimizer.step()
    assert all(torch.equal(parameters[role], values[role]) for role in values)
    assert (other < 1).all()


@pytest.mark.parametrize("strength", [0.5, 1.0, 20.0])
def test_what_is_left_is_told_before_training(strength):
    parameter = torch.nn.Parameter(torch.ones(1, 1, dtype=torch.float64))
    optimizer = stepping.PenalisedAdamW([{"params": [parameter]}], [(parameter, "in", "x")], strength)
    rates = [2e-3 * (1 - i / 300) for i in range(300)]
    for number, rate in enumerate(rates, 1):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.phase = "active" if number > 20 else "warm"
        optimizer.masks = {"x": torch.tensor([number < 60])}
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert stepping.left_of_one(rates, strength, 20, 60) == pytest.approx(parameter.abs().item(), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("hidden", "heads", "target"), [(768, 12, 192), (768, 12, 516), (384, 12, 192), (48, 4, 24), (1024, 16, 64)]
)
@both_strategies
def test_the_schedule_ends_when_it_says(hidden, heads, target, strategy):
    size = hidden // heads
    if strategy == "head":
        target = max(size, target // size * size)
    last = schedule.intervals(hidden, target, size, strategy)
    scores, each = torch.rand(hidden), (hidden - target) // heads

    def kept(k):
        fractional = each < schedule.DIM_INTERVALS
        attn = schedule.keep_attention(scores, k, target, size, strategy, fractional)
        dense = schedule.keep_smallest_out(scores, schedule.dense_drops(k, hidden, target))
        return int(attn.sum()), int(dense.sum())

    assert kept(last) == (target, target)
    assert kept(last + 5) == (target, target)
    assert max(kept(last - 1)) > target


class Breaks(Silent):
    """Stops a run as a crash would, at the log line of a step."""

    def progress(self, stage, done, total, facts):
        if done == 13:
            raise RuntimeError("cut off")


class Notes(Silent):
    """Keeps warnings."""

    def __init__(self):
        self.warnings = []

    def warn(self, message):
        self.warnings.append(message)


@pytest.fixture(scope="module")
def kit(models, data):
    return make_kit("text-classification", models, data)


def compress(kit, folder=None, reporter=None, **values):
    seed_everything(3)
    train = TrainSection(batch_size=4, log_every=1, checkpoint_every=6)
    run = Run(seed=3, reporter=reporter or Silent())
    context = Context(kit.task, [kit.task.example_inputs(kit.test, 3)], run, kit.train, train, folder)
    return wid.compress(
        kit.copy(kit.student), wid.Config(**{"hidden": 8, "steps": 18, "interval": 1} | values), context
    )


@both_strategies
def test_resumes_bit_for_bit_with_masks_in_the_checkpoint(kit, strategy, tmp_path):
    whole = compress(kit, strategy=strategy)
    with pytest.raises(RuntimeError, match="cut off"):
        compress(kit, tmp_path, Breaks(), strategy=strategy)
    saved, _ = newest(tmp_path)
    assert not saved["method.keep_hidden"].all()
    resumed = compress(kit, tmp_path, strategy=strategy)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert resumed.facts["loss"] == whole.facts["loss"]


def test_says_what_was_dropped_and_how_exact_the_merge_is(kit):
    facts = compress(kit, freeze=True).facts
    assert facts["shapes"] == {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    assert 0 < facts["largest_dropped_norm"] < 1
    assert facts["merge_difference"] < 1e-5
    assert facts["steps"] == 18
    notes = Notes()
    assert facts["largest_dropped_norm"] < compress(kit, None, notes, penalty=1.0).facts["largest_dropped_norm"]
    assert "cutting that off will hurt" in notes.warnings[0]
    assert any("had not shrunk yet" in warning for warning in notes.warnings)


def test_other_optimisers_and_parts_are_refused(kit):
    run = Run()
    context = Context(kit.task, [kit.task.example_inputs(kit.test, 3)], run, kit.train, TrainSection(optimizer="sgd"))
    with pytest.raises(UsageProblem, match="AdamW of its own"):
        wid.compress(kit.copy(kit.student), wid.Config(8), context)
    decoder = tf.BertLMHeadModel(tf.BertConfig(**SIZES, is_decoder=True))
    with pytest.raises(ModelProblem, match="cannot take a BertLMHeadModel"):
        anatomy_of(decoder)
    loaded = Loaded(tf.ElectraForMaskedLM(tf.ElectraConfig(**SIZES, embedding_size=8)), None, "x")
    with pytest.raises(ModelProblem, match="as wide as its embeddings"):
        wid.shrunk(loaded, wid.Config(8), anatomy_of(loaded.model))
