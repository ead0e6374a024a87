"""`bd-kd` against its reference values: both losses, both gradients, and what they are made of."""

import pytest
import torch

from kdtool.methods.bd_kd import bd_loss
from tests.golden._cases import cases

NAME = "bd_kd"


@pytest.mark.parametrize("case", cases(NAME))
def test_both_objectives_and_gradients(case):
    given, near = case.tensors, case.tolerance.of("float64")
    student = given["student_logits"].clone().requires_grad_()
    teacher = given["teacher_logits"].clone().requires_grad_()
    labels, hyper = given["labels"], case.hyper
    found = bd_loss(student, teacher, labels, hyper["kd_weight"], hyper["delta"], hyper["temperature"])
    ((found.student + found.teacher) / len(labels)).backward()
    values = {
        "student_loss": found.student / len(labels),
        "teacher_loss": found.teacher / len(labels),
        "grad_student": student.grad,
        "grad_teacher": teacher.grad,
        "entropy_student": found.entropy_student,
        "entropy_teacher": found.entropy_teacher,
        "weight_forward": found.weight_forward,
        "weight_reverse": found.weight_reverse,
        "mean_forward_kl": found.forward.mean(),
        "mean_reverse_kl": found.reverse.mean(),
    }
    for name, value in values.items():
        torch.testing.assert_close(value.detach(), given[name].to(value.dtype), **near, msg=name)
