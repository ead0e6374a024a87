"""Saving in a number format, reloading, and noticing when a save went wrong."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdtool import load
from kdtool.errors import QualityProblem
from kdtool.models import load_model
from kdtool.registry import TASKS
from kdtool.run import Run
from kdtool.saving import save_model
from kdtool.sections import OutputSection
from kdtool.verify import latency, reload_check


@pytest.fixture
def llama(models):
    return load_model(str(models("llama-small")), "AutoModelForCausalLM", Run())


@pytest.fixture
def task():
    return TASKS.get("causal-lm")()


@pytest.fixture
def probe():
    return {"input_ids": torch.arange(24).reshape(2, 12)}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@torch.no_grad()
def test_rounds_weights_but_never_rotary_frequencies(llama, probe, dtype, tmp_path):
    exact = llama.model.model.rotary_emb.inv_freq.clone()
    before = llama.model(**probe).logits
    save_model(llama, tmp_path, OutputSection(dtype=dtype))
    wanted = getattr(torch, dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {wanted}
    assert torch.equal(llama.model.model.rotary_emb.inv_freq, exact)
    assert {p.dtype for p in llama.model.parameters()} == {torch.float32}
    found = load(tmp_path)
    assert {p.dtype for p in found.parameters()} == {wanted}
    assert torch.equal(found.float().model.rotary_emb.inv_freq, exact)
    assert torch.equal(found(**probe).logits, llama.model(**probe).logits), "memory and file disagree"
    if dtype == "float32":
        assert torch.equal(found(**probe).logits, before)


@torch.no_grad()
def test_keep_means_the_format_the_model_came_in(llama, tmp_path):
    save_model(llama, tmp_path / "half", OutputSection(dtype="float16"))
    again = load_model(str(tmp_path / "half"), "AutoModelForCausalLM", Run())
    assert {p.dtype for p in again.model.parameters()} == {torch.float32}
    save_model(again, tmp_path / "kept", OutputSection())
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "kept"))
    assert all(torch.equal(tensor, right[key]) for key, tensor in left.items())


def test_small_shards(llama, tmp_path, probe):
    save_model(llama, tmp_path, OutputSection(max_shard_size="4KB"))
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(**probe).logits, llama.model(**probe).logits)


def test_reload_check_sees_a_corrupted_save(llama, task, probe, tmp_path):
    save_model(llama, tmp_path, OutputSection())
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    found = reload_check(tmp_path, task, llama.model, probe, False)
    assert not found["passed"]
    assert found["max_abs_diff"] > found["tolerance"]


def test_reload_check_says_why_a_fresh_process_failed(llama, task, probe, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'Traceback' >&2\necho 'OSError: no such weights' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))
    with pytest.raises(QualityProblem, match="does not load in a fresh process") as caught:
        reload_check(tmp_path, task, llama.model, probe, False)
    assert caught.value.why == "OSError: no such weights"


def test_latency_has_all_models_and_batches(llama, task, probe):
    views = {"one": {2: probe}, "two": {2: probe}}
    found = latency(task, {"one": llama.model, "two": llama.model}, views, 3, "cpu")
    assert set(found) == {"one", "two"}
    for side in found.values():
        assert 0 < side[2]["median_ms"] <= side[2]["p95_ms"]
