import json
import math
import subprocess
import sys

import pytest
import torch

from kdtool.divergences import _transport, cost, shortlist, sinkhorn_distance
from kdtool.methods.sinkd import annealed, soft_cross_entropy
from tests import tiny
from tests.cli.conftest import clean_environment, run_here
from tests.kits import make_kit


def logits(rows=6, classes=5, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    student, teacher = (scale * torch.randn(rows, classes, generator=generator, dtype=dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def plainly(student, teacher, tau=2.0, eps=0.1, rounds=20):
    """The formulas, word for word, through autograd."""
    p, q = (student / tau).softmax(-1), (teacher / tau).softmax(-1)
    costs = (p[:, None] - q[None]).abs().sum(-1)
    plan = (-costs / eps).exp()
    for _ in range(rounds):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * costs).sum()


@pytest.mark.parametrize("eps", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("rounds", [1, 3, 20])
def test_fast_and_stable_forms_equal_the_formulas(eps, rounds):
    student, teacher = logits()
    found, expected = (form(student, teacher, eps=eps, rounds=rounds) for form in (sinkhorn_distance, plainly))
    torch.testing.assert_close(found, expected)
    left, right = (torch.autograd.grad(loss, student)[0] for loss in (found, expected))
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize("elements", [1, 12, 40, 10**6])
def test_any_size_of_blocks_gives_the_same_costs_and_gradients(elements, monkeypatch):
    monkeypatch.setattr(_transport, "_CACHED", elements)
    student, teacher = logits(7)
    teacher.requires_grad_()
    weights = torch.arange(35.0, dtype=torch.float64).reshape(7, 5)
    found = cost(student, teacher[:5])
    expected = torch.cdist((student / 2).softmax(-1), (teacher[:5] / 2).softmax(-1), p=1.0)
    torch.testing.assert_close(found, expected)
    for left, right in zip(
        *(torch.autograd.grad((c * weights).sum(), (student, teacher)) for c in (found, expected)), strict=True
    ):
        torch.testing.assert_close(left, right)


def test_the_order_of_the_teachers_rows_does_not_matter():
    student, teacher = logits()
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    values = [sinkhorn_distance(student, rows) for rows in (teacher, teacher[order])]
    torch.testing.assert_close(*values, rtol=1e-13, atol=0)
    plans = [_transport.plan(cost(student, rows), 0.1, 20) for rows in (teacher, teacher[order])]
    torch.testing.assert_close(plans[0][:, order], plans[1])
    aligned = [soft_cross_entropy(student, rows) for rows in (teacher, teacher[order])]
    assert not torch.isclose(*aligned)


def test_columns_of_the_plan_sum_to_one():
    plan = _transport.plan(cost(*logits(9)), 0.1, 20).detach()
    assert (plan.sum(0) - 1).abs().max() < 1e-12
    assert plan.sum().item() == pytest.approx(9)


def test_one_unit_pays_its_own_distance():
    student, teacher = logits(1)
    torch.testing.assert_close(sinkhorn_distance(student, teacher), cost(student, teacher)[0, 0])


def test_equal_sets_are_apart_unless_debiased_or_eps_is_small():
    _, same = logits(16, 2)
    same.requires_grad_()
    assert sinkhorn_distance(same, same) > 0.1
    assert sinkhorn_distance(same, same, eps=1e-3) < 1e-2
    assert abs(sinkhorn_distance(same, same, debiased=True)) < 1e-9


@pytest.mark.parametrize("eps", [1e-3, 0.1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_small_formats_and_disjoint_supports_stay_finite(dtype, eps):
    student = torch.tensor([[60.0, 0, 0, 0], [0, 60, 0, 0]], dtype=dtype).requires_grad_()
    teacher = torch.tensor([[0, 0, 60.0, 0], [0, 0, 0, 60]], dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = sinkhorn_distance(student, teacher, eps=eps)
    found.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(4.0, rel=1e-3)  # two rows, each at distance 2
    assert torch.isfinite(student.grad).all()


def test_the_temperature_moves_to_one():
    assert [annealed(4.0, share) for share in (0.0, 0.5, 1.0)] == [4.0, 2.5, 1.0]


def test_the_shortlist_keeps_mass_and_likely_classes():
    student, teacher = logits(3, 50)
    cut = shortlist(student, teacher, 2.0, 4)
    assert cut[0].shape == cut[1].shape
    assert cut[0].shape[1] <= 13
    top = (teacher / 2).softmax(-1).max(1).values
    torch.testing.assert_close((cut[1] / 2).softmax(-1)[:, :-1].max(1).values, top)
    assert shortlist(student, teacher, 2.0, 50)[0] is student


def test_terms_of_a_step(models, data):
    kit = make_kit("text-classification", models, data)
    batch = kit.batch([0, 1, 2, 3])
    for values, factor in (({}, 4.0), ({"mean": True}, 1.0)):
        method = kit.build("sinkd", anneal=True, temperature=3.0, **values).eval()
        found = method(batch, 0.5)
        student = kit.task.forward(method.student, batch).logits
        teacher = kit.task.forward(method.teacher_list[0].model, batch).logits
        torch.testing.assert_close(found.parts["kd"], soft_cross_entropy(student, teacher, 2.0).detach())
        distance = factor * sinkhorn_distance(student, teacher)
        torch.testing.assert_close(found.parts["sinkhorn"], distance.detach())
        total = 0.1 * found.parts["ce"] + 0.9 * found.parts["kd"] + 0.8 * 0.001 * found.parts["sinkhorn"]
        torch.testing.assert_close(found.total, total)


def test_language_models_take_blocks_of_tokens(models, data):
    kit = make_kit("causal-lm", models, data)
    batch = kit.batch([0, 1])
    method = kit.build("sinkd", block=5).eval()
    student = kit.task.forward(method.student, batch).logits
    teacher = kit.task.forward(method.teacher_list[0].model, batch).logits
    blocks = zip(student.split(5), teacher.split(5), strict=True)
    expected = sum(len(s) * sinkhorn_distance(s, t) for s, t in blocks)
    torch.testing.assert_close(method(batch, 0.0).parts["sinkhorn"], expected.detach())


def test_two_processes_solve_one_problem(tmp_path):
    """17 rows in steps of 8, 8 and 1: in the last, one process has no row of its own."""
    teacher, rows = tiny.bert(tmp_path / "teacher", dropout=0.0), tiny.text_data(tmp_path / "rows", train=17)

    def words_of(folder, batch):
        words = ["distill", teacher, "--student", "layers:2", "--data", rows]
        words += ["--method", "sinkd", "--batch-size", batch, "--epochs", 2, "-o", tmp_path / folder]
        chosen = ["eval.latency=false", "eval.reload=false", "output.plots=false", "train.log_every=1"]
        for item in (*chosen, "train.lr=0.001", "train.teacher_cache=false", "method.scale=1"):
            words += ["--set", item]
        return list(map(str, words))

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "kdtool"]
    two = subprocess.Popen(
        [*launch, *words_of("two", 4)],
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    alone = run_here(*words_of("one", 8), folder=tmp_path)
    assert alone.returncode == 0, alone.stderr
    _, err = two.communicate(timeout=900)
    assert two.returncode == 0, err[-2000:]
    one, two = (json.loads((tmp_path / name / "kdtool.json").read_text())["history"] for name in ("one", "two"))
    assert len(one) == len(two) == 2 * math.ceil(17 / 8)
    for left, right in zip(one, two, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-5)
        # a sum of differences of probabilities: where these are all small, rounding is that of the probabilities
        assert right["parts"]["sinkhorn"] == pytest.approx(left["parts"]["sinkhorn"], rel=1e-5, abs=1e-6)
