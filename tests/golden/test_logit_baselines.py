"""The classical distillation losses against the published loss code.

`LOSSES` maps the name a golden case gives its method to a function (hyper, inputs) -> mean loss; the
gradient of every student input is checked as well. A case whose method is not registered yet is
skipped by name; one whose method is registered must have an entry.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdtool.divergences import forward_kl
from kdtool.methods import at, cc, crd, dist, dkd, fitnet, nst, ofd, pkt, reviewkd, rkd, simkd, sp, wsld
from kdtool.methods._maps import same_size
from kdtool.modeling.simkd import Projector
from kdtool.registry import METHODS

from ._cases import Case, cases

Inputs = Mapping[str, Tensor]


def kd(hyper: Mapping[str, Any], inputs: Inputs) -> dict[str, Tensor]:
    student, teacher = inputs["student_logits"], inputs["teacher_logits"]
    return {"loss": forward_kl(student, teacher, hyper["temperature"]) / len(student)}


def of_features(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Mapping[str, Any], Inputs], dict[str, Tensor]]:
    """A loss of two features or maps alone."""

    def mean(hyper: Mapping[str, Any], inputs: Inputs) -> dict[str, Tensor]:
        kind = "feature" if "student_feature" in inputs else "map"
        student, teacher = inputs[f"student_{kind}"], inputs[f"teacher_{kind}"]
        return {"loss": loss(student, teacher) / len(student)}

    return mean


def rkd_mean(hyper: Mapping[str, Any], inputs: Inputs) -> dict[str, Tensor]:
    s, t = inputs["student_feature"], inputs["teacher_feature"]
    parts = hyper["distance_weight"] * rkd.distance_loss(s, t) + hyper["angle_weight"] * rkd.angle_loss(s, t)
    return {"loss": parts / len(s)}


def at_mean(hyper: Mapping[str, Any], inputs: Inputs) -> dict[str, Tensor]:
    s, t = (value.flatten(2) for value in same_size(inputs["student_map"], inputs["teacher_map"]))
    return {"loss": at.at_loss(s, t, p=hyper["p"]) / len(s)}


def nst_mean(hyper: Mapping[str, Any], inputs: Inputs) -> dict[str, Tensor]:
    s, t = (value.flatten(2) for value in same_size(inputs["student_map"], inputs["teacher_map"]))
    return {"loss": nst.nst_loss(s, t) / len(s)}


def ofd_mean(hyper: Mapping[str, Any], inputs: Inputs) -> dict[str, Tensor]:
    s = inputs["student_map"]
    return {"loss": ofd.ofd_loss(s, inputs["teacher_map"], inputs["margin"]) / len(s)}


def reviewkd_mean(hyper: Mapping[str, Any], inputs: Inputs) -> dict[str, Tensor]:
    s = inputs["student_map"]
    return {"loss": reviewkd.hcl_loss(s, inputs["teacher_map"], hyper["levels"]) / len(s)}


def crd_mean(hyper: Mapping[str, Any], inputs: Inputs) -> dict[str, Tensor]:
    """View 1 is the student's, view 2 the teacher's; each anchor meets the other view's memory."""
    embedded = {
        side: functional.normalize(
            functional.linear(inputs[f"{name}_feature"], inputs[f"embed_{side}_weight"], inputs[f"embed_{side}_bias"])
        )
        for side, name in (("s", "student"), ("t", "teacher"))
    }
    memory_s, memory_t = inputs["memory_v1"], inputs["memory_v2"]
    index, tau = inputs["contrast_index"], hyper["nce_t"]
    h_s = crd.scores(embedded["s"], memory_t, index, tau) / hyper["Z_v1"]
    h_t = crd.scores(embedded["t"], memory_s, index, tau) / hyper["Z_v2"]
    found = {"loss": sum(crd.contrast_loss(h, hyper["n_data"]) for h in (h_s, h_t)) / len(index)}
    for name, memory, side in (("memory_v1", memory_s, "s"), ("memory_v2", memory_t, "t")):
        rows = inputs["index"]
        new = crd.moved(memory, rows, embedded[side].detach(), hyper["momentum"])
        found[f"{name}_after"] = memory.index_copy(0, rows, new)
    return found


def simkd_mean(hyper: Mapping[str, Any], inputs: Inputs) -> dict[str, Tensor]:
    s, t = inputs["student_map"], inputs["teacher_map"]
    widths = s.shape[1], t.shape[1] // hyper["factor"], t.shape[1]
    project = Projector(*widths).train()
    for number, layer in enumerate(m for m in project if isinstance(m, nn.Conv2d)):
        layer.weight = nn.Parameter(inputs[f"conv{number}_weight"].detach())
    projected = project(same_size(s, t)[0])
    logits = functional.linear(projected.mean((2, 3)), inputs["teacher_fc_weight"], inputs["teacher_fc_bias"])
    return {"loss": simkd.simkd_loss(projected, t) / len(s), "student_logits": logits}


def dkd_mean(hyper: Mapping[str, Any], inputs: Inputs) -> dict[str, Tensor]:
    student = inputs["student_logits"]
    target, nontarget = dkd.dkd_terms(student, inputs["teacher_logits"], inputs["labels"], hyper["temperature"])
    return {"loss": (hyper["alpha"] * target + hyper["beta"] * nontarget) / len(student)}


def wsld_mean(hyper: Mapping[str, Any], inputs: Inputs) -> dict[str, Tensor]:
    student = inputs["student_logits"]
    loss = wsld.wsld_loss(student, inputs["teacher_logits"], inputs["labels"], hyper["temperature"])
    return {"loss": hyper["alpha"] * loss / len(student)}


def dist_mean(hyper: Mapping[str, Any], inputs: Inputs) -> dict[str, Tensor]:
    student = inputs["student_logits"]
    inter, intra = dist.dist_terms(student, inputs["teacher_logits"], hyper["temperature"])
    return {"loss": (hyper["beta"] * inter + hyper["gamma"] * intra) / len(student)}


LOSSES: dict[str, Callable[[Mapping[str, Any], Inputs], dict[str, Tensor]]] = {
    "kd": kd,
    "dkd": dkd_mean,
    "wsld": wsld_mean,
    "dist": dist_mean,
    "pkt": of_features(pkt.pkt_loss),
    "rkd": rkd_mean,
    "sp": of_features(sp.sp_loss),
    "at": at_mean,
    "hint": of_features(fitnet.hint_loss),
    "cc": of_features(cc.cc_loss),
    "nst": nst_mean,
    "reviewkd_hcl": reviewkd_mean,
    "ofd": ofd_mean,
    "crd": crd_mean,
    "simkd": simkd_mean,
}

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
