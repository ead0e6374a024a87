"""Distillation between tokenizers: the formulas of uld and span-kd, on models that share no tokens, and whole runs."""

import json

import pytest
import torch

from kdtool.config import load_config
from kdtool.divergences import Divergence, Head, Matched, Universal, compare, divergence
from kdtool.methods.span_kd import either, span_log_probs
from kdtool.pipelines import distill
from kdtool.pipelines.setup import make_run
from tests.kits import make_kit

ROWS, WIDTH, OWN, THEIRS = 5, 3, 7, 9
OWN_IDS, THEIR_IDS = torch.tensor([1, 4, 6]), torch.tensor([8, 0, 3])


def normals():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def apart(q, p):
    """Universal logit distance, word for word."""
    size = max(q.shape[1], p.shape[1])
    q, p = (torch.nn.functional.pad(x.sort(-1, descending=True).values, (0, size - x.shape[1])) for x in (q, p))
    return (q - p).abs().sum()


@pytest.fixture(params=["teacher has more tokens", "student has more tokens"])
def sides(request):
    normal = normals()
    sizes = (OWN, THEIRS) if request.param.startswith("teacher") else (THEIRS, OWN)
    student = [normal(ROWS, WIDTH).requires_grad_(), (2 * normal(sizes[0], WIDTH)).requires_grad_()]
    return student, (normal(ROWS, WIDTH), Head(2 * normal(sizes[1], WIDTH)))


def check(sides, measure, formula, temperature):
    (hidden, matrix), (there, head) = sides
    q, p = ((z / temperature).softmax(-1) for z in (hidden @ matrix.T, head.logits(there)))
    expected = formula(q, p)
    found, _, value = compare(hidden, Head(matrix), (there, head), None, measure, 0.7, rows=2)
    torch.testing.assert_close(value, expected.detach())
    left, right = (torch.autograd.grad(one, (hidden, matrix)) for one in (found, 0.7 * expected))
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other)


def test_universal_distance_and_its_gradient(sides):
    check(sides, Universal(1.7), apart, 1.7)


@pytest.mark.parametrize("kind", ["forward-kl", "jsd"])
def test_shared_tokens_and_the_rest(sides, kind):
    wider = sides[0][1].shape[0] > sides[1][1].weight.shape[0]
    own, other = (THEIR_IDS, OWN_IDS) if wider else (OWN_IDS, THEIR_IDS)

    def formula(q, p):
        small = []
        for one, ids in ((q, own), (p, other)):
            kept = one[:, ids]
            small.append(torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1).log())
        rest = [one.index_fill(1, ids, 0.0) for one, ids in ((q, own), (p, other))]
        return divergence(*small, Divergence(kind, 0.3)) + 0.4 * apart(*rest)

    check(sides, Matched(own, other, Divergence(kind, 0.3, temperature=1.7), 0.4), formula, 1.7)


def test_spans_have_the_product_of_their_tokens():
    log_q = torch.tensor([-0.1, -0.2, -0.4, -0.8, -1.6]).requires_grad_()
    found = span_log_probs(log_q, torch.tensor([0, 3]), torch.tensor([2, 4]))
    torch.testing.assert_close(found, torch.tensor([-0.3, -0.8]))
    found.sum().backward()
    assert log_q.grad.tolist() == [1, 1, 0, 1, 0]
    torch.testing.assert_close(either(found.detach()).exp().sum(-1), torch.ones(2))
    assert torch.isfinite(either(torch.zeros(1))).all()


def distilled(models, data, folder, method, *settings):
    options = {"teacher.model": str(models("llama-bytes")), "student.model": str(models("llama-small"))}
    options |= {"data.source": str(data), "method.name": method, "output.folder": str(folder)}
    quick = [
        "eval.latency=false",
        "eval.reload=false",
        "output.plots=false",
        "train.lr=0.01",
        "train.max_steps=12",
        "train.log_every=1",
    ]
    config = load_config("distill", None, [*quick, "train.batch_size=8", *settings], options)
    result = distill(config, make_run(config))
    return result, json.loads((folder / "kdtool.json").read_text())["history"]


@pytest.mark.parametrize("method", ["uld", "span-kd"])
@pytest.mark.parametrize("kind", ["prompts", "plain"])
def test_a_student_learns_from_a_teacher_with_another_tokenizer(models, data, tmp_path, method, kind):
    result, history = distilled(models, data(kind), tmp_path / "out", method, "method.ce_weight=0")
    first, last = (sum(row["loss"] for row in part) for part in (history[:3], history[-3:]))
    assert last < first
    assert result.proof.teacher.metrics["loss"] > 0
    assert "agreement" not in result.proof.student.metrics


def test_heads_padded_to_other_sizes_are_cut(models, data):
    """A teacher whose head has five rows more than there are tokens."""
    kit = make_kit("causal-lm", lambda name: models("llama-padded" if name == "llama" else name), data)
    batch = kit.batch([0, 1, 2])
    for name in ("kd", "logit-mse", "sinkd"):
        method = kit.build(name).eval()
        found = method(batch, 0.0)
        student, teacher = (
            kit.task.forward(m, batch).logits[:, :28] for m in (method.student, method.teacher_list[0].model)
        )
        if name == "kd":
            assert method.by_chunks
            expected = divergence(student, teacher, Divergence(temperature=4.0)) * 16
            torch.testing.assert_close(found.parts["kd"], expected.detach(), rtol=1e-5, atol=1e-5)
        assert torch.isfinite(found.total)
