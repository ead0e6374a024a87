"""NKD against the published loss: value, target part and gradient, in both float formats."""

import pytest
import torch

from kdtool.methods.nkd import nkd_terms

from ._cases import Case, cases

FORMATS = {"float32": (torch.float32, ""), "float64": (torch.float64, "_f64")}


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("case", cases("nkd"))
def test_nkd(case: Case, dtype):
    kind, suffix = FORMATS[dtype]
    student, teacher = (case.tensors[key].clone().to(kind) for key in ("student_logits", "teacher_logits"))
    student.requires_grad_()
    target, nontarget = nkd_terms(student, teacher, case.tensors["labels"], case.hyper["temperature"])
    loss = (target + case.hyper["gamma"] * nontarget) / len(student)
    loss.backward()
    found = {"loss": loss.detach(), "loss_target": target.detach() / len(student), "grad_student": student.grad}
    for key, value in found.items():
        expected = case.tensors[key + suffix]
        torch.testing.assert_close(value, expected, **case.tolerance.of(dtype), msg=lambda t, key=key: f"{key}: {t}")
