"""The classical distillation losses against the published loss code.

`LOSSES` maps the name a golden case gives its method to a function (hyper, inputs) -> mean loss; the
gradient of every student input is checked as well. A case whose method is not registered yet is
skipped by name; one whose method is registered must have an entry.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from kdtool.divergences import forward_kl
from kdtool.registry import METHODS

from ._cases import Case, cases

Inputs = Mapping[str, Tensor]


def kd(hyper: Mapping[str, Any], inputs: Inputs) -> dict[str, Tensor]:
    student, teacher = inputs["student_logits"], inputs["teacher_logits"]
    return {"loss": forward_kl(student, teacher, hyper["temperature"]) / len(student)}


LOSSES: dict[str, Callable[[Mapping[str, Any], Inputs], dict[str, Tensor]]] = {"kd": kd}

REGISTERED_AS = {"hint": "fitnet", "reviewkd_hcl": "reviewkd"}
"""Where kdtool's name of a method is not the case's."""


@pytest.mark.parametrize("case", cases("logit_baselines"))
def test_logit_baselines(case: Case):
    method = case.hyper["method"]
    registered = REGISTERED_AS.get(method, method).replace("_", "-")
    if registered not in METHODS.names() and method not in LOSSES:
        pytest.skip(f"the method {method} is not registered yet")
    assert method in LOSSES, f"{registered} is registered: add {method!r} to LOSSES in {__file__}"
    inputs = {name: case.tensors[name].clone() for name in case.roles("input")}
    outputs = case.roles("output")
    assert "loss" in outputs
    wanted = [name.removeprefix("grad_") for name in outputs if name.startswith("grad_")]
    assert wanted
    for name in wanted:
        inputs[name].requires_grad_()
    found = LOSSES[method](case.hyper, inputs)
    found["loss"].backward()
    for name in outputs:
        actual = inputs[name.removeprefix("grad_")].grad if name.startswith("grad_") else found[name].detach()
        torch.testing.assert_close(
            actual, case.tensors[name], **case.tolerance.of("float32"), msg=lambda text, name=name: f"{name}: {text}"
        )
