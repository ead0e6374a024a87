"""The figures of --dry-run: exact where they can be, of the right size elsewhere."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    ViTConfig,
    ViTForImageClassification,
)

from kdtool.compressors import wid
from kdtool.compressors._wid_anatomy import anatomy_of
from kdtool.compressors._wid_method import Inheritance
from kdtool.config import load_config
from kdtool.data.examples import Examples
from kdtool.errors import UsageProblem
from kdtool.models import Loaded
from kdtool.pipelines.estimate import Size, estimate, memory_parts, size_of, tokens_of, training_stage, without_layers
from kdtool.pipelines.plan import plan
from kdtool.registry import COMPRESSORS, METHODS, TASKS
from kdtool.run import Run
from kdtool.train.loop import Trainer
from tests import tiny

MIB = 2**20
STUDENT = Size(64 * MIB, 32 * MIB, 256, 4, 512, 3)
TEACHER = Size(128 * MIB, 64 * MIB, 256, 8, 512, 3)


def config_of(*settings, method="kd"):
    return load_config("distill", None, settings, {"method.name": method, "train.batch_size": 8})


def memory(run, *settings):
    return estimate(config_of(*settings), run, STUDENT, TEACHER, (20.0, 64, 1000), 10)["memory"]


def test_sizes_tell_looked_up_tables_from_weights_that_work(tmp_path):
    model = AutoModelForSequenceClassification.from_config(tiny.bert_config(layers=2))
    size = size_of(model.config, model)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    assert size.working == size.parameters - tables
    assert (size.width, size.layers, size.tokens, size.classes) == (16, 2, 32, 3)
    left = without_layers(size, 100, 1)
    assert (left.parameters, left.working, left.layers) == (size.parameters - 100, size.working - 100, 1)


def test_an_image_is_its_patches():
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    assert size_of(config, ViTForImageClassification(config)).tokens == 5


def test_memory_counts_weights_gradients_and_optimiser():
    # 4 bytes a weight: teacher once; student, its gradients and two moments
    assert "teacher 512 MiB" in memory(Run())
    assert "optimiser 1.0 GiB" in memory(Run())
    assert "optimiser 768 MiB" in memory(Run(), "train.optimizer=sgd")
    # 8 rows of 64 tokens, 256 wide, 4 layers, 17 values of 4 bytes
    assert f"activations {8 * 64 * 256 * 4 * 17 * 4 // MIB} MiB" in memory(Run())
    assert memory(Run(dtype="bfloat16")).endswith(f"activations {8 * 64 * 256 * 4 * 17 * 2 // MIB} MiB)")


def test_sharding_divides_what_is_sharded():
    assert memory(Run(world=4)) == memory(Run())
    # a quarter of 1 GiB, and two of four layers at 4 bytes
    assert "1/4 of weights, gradients, optimiser, two whole layers 384 MiB" in memory(
        Run(world=4), "train.parallel=fsdp2"
    )


@pytest.mark.parametrize(
    ("settings", "method", "expected"),
    [
        (("train.teacher_cache=true",), "kd", "of which 1 MiB teacher cache"),
        ((), "kd", None),  # 80 of 1000 rows are seen, none of them twice
        (("train.teacher_cache=true",), "gkd", None),  # its texts are new ones
        (("train.teacher_cache=false",), "kd", None),
        ((), "none", None),
    ],
)
def test_disk(settings, method, expected):
    told = estimate(config_of(*settings, method=method), Run(), STUDENT, TEACHER, (20.0, 64, 1000), 10)["disk"]
    # the result, and three checkpoints of weights and two moments
    assert told.startswith(f"{64 * 4 * (1 + 3 * 3) / 1024:.1f} GiB")
    assert (expected or "GiB") in told
    assert ("cache" in told) == (expected is not None)


def test_time_grows_with_steps_and_is_left_out_where_nothing_is_known():
    few, many = (
        estimate(config_of(), Run(), STUDENT, None, (20.0, 64, 1000), steps)["time"].split("(")[1].split()[0]
        for steps in (10, 1000)
    )
    assert float(many) == pytest.approx(100 * float(few), rel=0.01)
    assert "not estimated" in estimate(config_of(), Run(), STUDENT, TEACHER, None, 10)["time"]


def test_rows_of_a_language_model_are_windows(models, data):
    options = {"data.source": str(data("plain")), "data.task": "causal-lm", "data.max_length": 8}
    options |= {"teacher.model": str(models("llama")), "student.model": "layers:2", "method.name": "kd"}
    found = plan(load_config("distill", None, [], options), processes=2)
    # 40 texts of about 8 words are 60 windows of 8 tokens, give or take; each process takes every other
    assert 1 <= found["training"]["steps"] <= 6
    assert found["training"]["processes"] == 2
    assert set(found["estimate"]) == {"memory", "disk", "time"}


def test_lengths_of_texts_are_estimated_and_cut(data):
    task = TASKS.get("text-classification")()
    rows = Examples({"text": ["one two three four five"] * 10 + ["word " * 1000]})
    mean, longest, count = tokens_of(config_of("data.max_length=16"), task, rows, STUDENT)
    assert (longest, count) == (16, 11)
    assert mean == pytest.approx((10 * 9 + 16) / 11)
    assert tokens_of(config_of(), task, Examples({"audio": [0]}), STUDENT) is None
    prompts = Examples({"prompt": ["one two three"] * 4, "response": ["four five"] * 4})
    assert tokens_of(config_of(), TASKS.get("causal-lm")(), prompts, STUDENT) == (9.0, 9, 4)


ROWS, LENGTH, VOCABULARY = 4, 96, 32000


class Words:
    """What methods ask a tokenizer of a large vocabulary."""

    eos_token_id = 3

    def __len__(self):
        return VOCABULARY


def language_model(width):
    """A small body and a large vocabulary."""
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, bos_token_id=2, eos_token_id=3, **shape)
    return Loaded(AutoModelForCausalLM.from_config(config), Words(), "x")


def peak_of(measured):
    """Most bytes that were held at once of those allocated under a profiler."""
    found = [event for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(found, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("none", ()),
        ("kd", ()),
        ("kd", ("train.grad_accum=2",)),
        ("sinkd", ("method.block=32",)),
        ("supervised-kd", ()),
        ("combine", ("method.terms=[kd:1]",)),
        ("logit-mse", ()),
    ],
)
def test_memory_is_what_training_takes(method, settings):
    """Within a third, against torch's own count; whole logits, which few methods hold, within a factor of two."""
    config = config_of("data.task=causal-lm", "train.max_steps=2", "train.lr=0.001", *settings, method=method)
    config.train.batch_size = ROWS
    teacher, student = (language_model(width) for width in (24, 16))
    kind, task = METHODS.get(method), TASKS.get("causal-lm")()
    chosen = METHODS.build_config(method, config.method_values)
    made = kind(chosen, student, [teacher] if kind.reads_teacher else [], task)
    rows = Examples({"input_ids": torch.randint(4, VOCABULARY, (2 * ROWS, LENGTH)).numpy()})
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        Trainer(made, rows, config.train, Run()).train()
    sizes = [size_of(one.model.config, one.model) for one in (student, teacher)]
    parts = memory_parts(config, Run(), *sizes, (float(LENGTH), LENGTH, len(rows)), cached=False)
    weights = 4 * (sizes[0].parameters + (sizes[1].parameters if kind.reads_teacher else 0))
    expected, found = sum(parts.values()) - weights, peak_of(measured)
    factor = 2 if method == "logit-mse" else 4 / 3
    assert found / factor < expected < found * factor


@pytest.mark.parametrize(
    ("name", "kind", "rows", "length"),
    [
        ("text-classification", BertForSequenceClassification, 8, 64),  # compactors times weights
        ("text-classification", BertForSequenceClassification, 2, 8),  # compactors times inputs
        ("masked-lm", BertForMaskedLM, 8, 64),
    ],
)
def test_memory_of_wid_is_what_it_takes(monkeypatch, name, kind, rows, length):
    """Within a third, against torch's own count."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192}
    model = kind(BertConfig(vocab_size=500, max_position_embeddings=length, **sizes)).eval()
    ids = torch.randint(5, 500, (rows, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(rows, dtype=torch.long)}
    if name == "masked-lm":
        batch["labels"] = ids.masked_fill(torch.rand(ids.shape) > 0.15, -100)
    task = TASKS.get(name)()
    monkeypatch.setattr(task, "collate", lambda items: {key: value[: len(items)] for key, value in batch.items()})
    config = load_config(
        "compress", None, [f"data.task={name}", f"train.batch_size={rows}", "train.max_steps=2", "train.lr=0.001"], {}
    )
    settings = COMPRESSORS.build_config("wid", {"hidden": 24, "steps": 1000})
    loaded = Loaded(model, None, "x", facts={"dtype": "float32", "new_weights": []})
    data = Examples({"input_ids": ids.numpy()})
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        anatomy = anatomy_of(model)
        method = Inheritance(wid.goal_of(settings, anatomy), wid.untied(loaded, anatomy), anatomy, task)
        Trainer(method, data, config.train, Run()).train()
    extra = wid.training_memory(loaded, settings, rows * length)
    size = size_of(model.config, model)
    parts = training_stage(config, Run(), size, (float(length), length, rows), extra)
    expected, found = sum(parts.values()) - parts["model"], peak_of(measured)
    assert found * 3 / 4 < expected < found * 4 / 3


def test_the_plan_of_wid_counts_what_it_trains(models, data):
    def told(*settings):
        given = {"teacher.model": str(models("bert")), "data.source": str(data("text"))}
        return plan(load_config("compress", None, settings, given))["estimate"]["memory"]

    found = told("method.name=wid", "method.hidden=8")
    assert all(part in found for part in ("a process (model", "copy of the model", "compactors", "activations"))
    assert "compactors" not in told("method.name=width")
    with pytest.raises(UsageProblem, match="cannot be divided"):
        told("method.name=wid", "method.hidden=7")
