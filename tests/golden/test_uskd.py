"""USKD against the published loss: its parts and the gradients of logits, feature and weak classifier."""

import pytest
import torch
from torch.nn import functional

from kdtool.methods.uskd import uskd_terms

from ._cases import Case, cases

INPUTS = {
    "grad_student": "student_logits",
    "grad_feature_mid": "feature_mid",
    "grad_weak_weight": "weak_weight",
    "grad_weak_bias": "weak_bias",
}


@pytest.mark.parametrize("case", cases("uskd"))
def test_uskd(case: Case):
    inputs = {name: case.tensors[name].clone().requires_grad_() for name in INPUTS.values()}
    weak = functional.linear(inputs["feature_mid"], inputs["weak_weight"], inputs["weak_bias"])
    parts = uskd_terms(inputs["student_logits"], weak, case.tensors["labels"])
    target, nontarget, supervision = (part / len(weak) for part in parts)
    loss = case.hyper["alpha"] * target + case.hyper["beta"] * nontarget + case.hyper["mu"] * supervision
    loss.backward()
    found = {"loss": loss, "loss_target": target, "loss_nontarget": nontarget, "loss_weak": supervision}
    found |= {key: inputs[name].grad for key, name in INPUTS.items()}
    for key in case.roles("output"):
        torch.testing.assert_close(
            found[key].detach(),
            case.tensors[key],
            **case.tolerance.of("float32"),
            msg=lambda text, key=key: f"{key}: {text}",
        )
