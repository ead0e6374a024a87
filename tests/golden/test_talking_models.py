"""`talking-models` against its reference values: every loss, and the gradients of states and codecs."""

import pytest
import torch
from torch import nn

from kdtool.methods.talking_models import converse
from tests.golden._cases import cases

NAME = "talking_models"
CODECS = ("enc_s", "dec_s", "enc_t", "dec_t")


def codec_of(given, name):
    """The codec of a case, layers 0 and, if there, 2."""
    layers = []
    for number in ("0", "2"):
        if f"{name}.{number}.weight" in given:
            weight, bias = given[f"{name}.{number}.weight"], given[f"{name}.{number}.bias"]
            layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers += [layer] if number == "0" else [nn.ReLU(), layer]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("case", cases(NAME))
def test_losses_and_gradients(case):
    given, near, hyper = case.tensors, case.tolerance.of("float64"), case.hyper
    codecs = {name: codec_of(given, name) for name in CODECS}
    low, high = (given[f"student_{which}"].clone().requires_grad_() for which in ("low", "high"))
    a1, b1, a2, b2 = (given[f"teacher_mid.{key}"] for key in ("A1", "a1", "A2", "a2"))
    talk = converse(
        codecs,
        lambda x: x + torch.tanh(x @ a1.T + b1) @ a2.T + b2,
        (low, high, given["teacher_low"], given["teacher_high"]),
        given["mask"],
        hyper["rounds"],
    )
    interact = talk.rounds.mean()
    total = hyper["w1_interact"] * interact + hyper["w2_message"] * talk.message + hyper["w3_state"] * talk.state
    total.backward()
    values = {
        "interact_per_round": talk.rounds,
        "interact": interact,
        "message_consistency": talk.message,
        "state_consistency": talk.state,
        "state_consistency_auto": talk.own,
        "total": total,
        "decoded_last": talk.last,
        "grad.student_low": low.grad,
        "grad.student_high": high.grad,
    }
    for name, codec in codecs.items():
        values |= {f"grad.{name}.{key}": parameter.grad for key, parameter in codec.named_parameters()}
    for name, value in values.items():
        expected = given[name]
        value = torch.zeros_like(expected) if value is None else value.detach().reshape(expected.shape)
        torch.testing.assert_close(value, expected, **near, msg=lambda text, name=name: f"{name}: {text}")
