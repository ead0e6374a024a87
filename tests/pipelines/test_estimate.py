"""The figures of --dry-run: exact where they can be, of the right size elsewhere."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, ViTConfig, ViTForImageClassification

from kdtool.config import load_config
from kdtool.pipelines.estimate import Size, estimate, size_of, tokens_of, without_layers
from kdtool.pipelines.plan import plan
from kdtool.registry import TASKS
from kdtool.run import Run
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
        ((), "kd", "of which 1 MiB teacher cache"),
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
    from kdtool.data.examples import Examples

    rows = Examples({"text": ["one two three four five"] * 10 + ["word " * 1000]})
    mean, longest, count = tokens_of(config_of("data.max_length=16"), task, rows, STUDENT)
    assert (longest, count) == (16, 11)
    assert mean == pytest.approx((10 * 9 + 16) / 11)
    assert tokens_of(config_of(), task, Examples({"audio": [0]}), STUDENT) is None
    prompts = Examples({"prompt": ["one two three"] * 4, "response": ["four five"] * 4})
    assert tokens_of(config_of(), TASKS.get("causal-lm")(), prompts, STUDENT) == (9.0, 9, 4)
