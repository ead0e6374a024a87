"""Methods of language models that compare some tokens at a time: the numbers of logits held as a whole."""

import pytest
import torch

from tests.kits import gradients, make_kit

CASES = {
    "kd": {"temperature": 3.0},
    "sinkd": {"block": 5, "scale": 0.1},
    "none": {},
    "combine": {"terms": ["kd:0.5", {"name": "sinkd", "weight": 2, "ramp": 0.6}], "ce_weight": 0.3},
}


@pytest.fixture(scope="module")
def kit(models, data):
    return make_kit("causal-lm", models, data)


def stepped(method, batch):
    losses = method(batch, 0.5)
    losses.total.backward()
    return losses, gradients(method)


@pytest.mark.parametrize("name", CASES)
def test_chunks_give_the_numbers_of_whole_logits(kit, name):
    method = kit.build(name, **CASES[name]).eval()
    assert method.by_chunks
    found, slopes = stepped(method, kit.batch([0, 1, 2]))
    method.zero_grad(set_to_none=True)
    method.by_chunks = False
    expected, exact = stepped(method, kit.batch([0, 1, 2]))
    torch.testing.assert_close(found.total, expected.total, rtol=1e-5, atol=1e-5)
    assert found.count == expected.count
    assert found.parts.keys() == expected.parts.keys()
    for key, value in expected.parts.items():
        torch.testing.assert_close(found.parts[key], value, rtol=1e-5, atol=1e-5, msg=key)
    scale = max(float(gradient.abs().max()) for gradient in exact.values())
    assert slopes.keys() == exact.keys()
    for key, gradient in exact.items():
        torch.testing.assert_close(slopes[key], gradient, rtol=1e-4, atol=1e-5 * scale, msg=key)


def test_the_head_is_never_run_as_a_whole(kit, monkeypatch):
    """The output embedding is not called, so no [tokens, vocabulary] of it are made; nor the task's forward."""
    method = kit.build("kd")
    for model in (method.student, method.teacher_list[0].model):
        monkeypatch.setattr(model.get_output_embeddings(), "forward", pytest.fail)
    monkeypatch.setattr(kit.task, "forward", pytest.fail)
    method(kit.batch([0, 1]), 0.5).total.backward()


def test_methods_that_need_logits_and_odd_heads_go_on_as_before(kit):
    assert not kit.build("logit-mse").by_chunks
    assert not kit.build("combine", terms=["kd:1", "logit-mse:1"]).by_chunks
    student = kit.copy(kit.student)
    head = student.model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _args, out: out + torch.arange(out.shape[-1]))
    assert not kit.task.has_states(student.model)
    assert kit.task.has_states(kit.student.model)
