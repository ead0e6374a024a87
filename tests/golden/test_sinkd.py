"""SinKD against the published losses: cost, plan, distance, the other terms, and all gradients."""

import pytest
import torch
from torch.nn import functional

from kdtool.divergences import _transport, cost, sinkhorn_distance
from kdtool.methods.sinkd import annealed, soft_cross_entropy

from ._cases import Case, cases


def close(case, dtype, **found):
    for key, value in found.items():
        expected = case.tensors[key].to(value.dtype).reshape(value.shape)
        torch.testing.assert_close(value, expected, **case.tolerance.of(dtype), msg=lambda t, key=key: f"{key}: {t}")


def transport(case, dtype):
    """Logits, with gradient on the student's, and the arguments of the transport problem."""
    kind = getattr(torch, dtype)
    student, teacher = (case.tensors[key].clone().to(kind) for key in ("student_logits", "teacher_logits"))
    return student.requires_grad_(), teacher, {"eps": case.hyper["eps"], "rounds": case.hyper["iters"]}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", cases("sinkd"))
def test_distance(case: Case, dtype):
    student, teacher, settings = transport(case, dtype)
    costs = cost(student, teacher, case.hyper["tau"])
    plan = _transport.plan(costs, **settings)
    distance = sinkhorn_distance(student, teacher, case.hyper["tau"], **settings)
    distance.backward()
    close(case, dtype, cost=costs.detach(), plan=plan.detach(), sinkhorn_unscaled=distance.detach())
    close(case, dtype, grad_sinkhorn_unscaled=student.grad)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", cases("sinkd"))
def test_total(case: Case, dtype):
    weights = case.entry.get("kd")
    if weights is None:
        pytest.skip("the case has no other terms")
    student, teacher, settings = transport(case, dtype)
    degree = weights["T"]
    if "epoch" in weights:
        degree = annealed(degree, weights["epoch"] / max(1, weights["total"] - 1))
    labels = case.tensors["labels"]
    if case.entry["mode"] == "regression":
        ce = functional.mse_loss(student.flatten(), labels.to(student.dtype))
    else:
        ce = functional.cross_entropy(student, labels)
    kd = soft_cross_entropy(student, teacher, degree) / len(student)
    distance = sinkhorn_distance(student, teacher, case.hyper["tau"], **settings)
    total = (1 - weights["alpha"]) * ce + weights["alpha"] * kd
    total = total + weights["beta"] * case.hyper["weight"] * distance
    total.backward()
    close(case, dtype, ce=ce.detach(), kd=kd.detach(), total=total.detach(), grad_total=student.grad)
