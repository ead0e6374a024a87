"""Overhaul of feature distillation: the margin, the partial distance, taps before the ReLU."""

import math

import pytest
import torch

from kdtool.methods.ofd import last_norm, margin_of, ofd_loss, seen_margin
from tests.methods import cnn


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (-0.7, 0.5), (2.0, -1.0), (0.3, 0.6)])
def test_margin_is_the_mean_below_zero(scale, shift):
    torch.manual_seed(0)
    values = torch.randn(400_000, dtype=torch.float64) * abs(scale) + shift
    found = margin_of(torch.tensor([scale]), torch.tensor([shift]))
    assert float(found) == pytest.approx(float(values[values < 0].mean()), rel=0.02)
    torch.testing.assert_close(seen_margin(values[None, None, :, None]).float(), found, rtol=0.02, atol=0)


def test_margin_of_scales_of_zero_and_of_rare_negatives_is_finite():
    found = margin_of(torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor([-2.0, 0.0, 3.0, 8.0]))
    torch.testing.assert_close(found, torch.tensor([-2.0, 0.0, 0.0, -3.0]))


def test_partial_distance_case_by_case():
    margin = torch.full((1, 1, 1, 1), -1.0)
    #            s > m, t < m   s < m, t < m   s > t in between   s < t in between   t > 0
    s = torch.tensor([0.5, -2.0, -0.2, -0.9, 1.0]).reshape(1, 1, 1, 5)
    t = torch.tensor([-3.0, -3.0, -0.5, -0.5, 3.0]).reshape(1, 1, 1, 5)
    assert float(ofd_loss(s, t, margin)) == pytest.approx(1.5**2 + 0 + 0.3**2 + 0 + 2.0**2)


def test_taps_and_margins_come_from_the_last_norm_before_the_relu():
    method = cnn.build("ofd")
    assert method.teacher_taps == ("pre:-3", "pre:-2", "pre:-1")
    teacher = method.teacher_list[0].model
    assert last_norm(teacher, "pre:-1", 16) is teacher.layer3[1].bn2
    expected = margin_of(teacher.layer3[1].bn2.weight, teacher.layer3[1].bn2.bias)
    assert torch.equal(method.margin2.flatten(), expected.detach())
    assert math.isclose(float(method.state_dict()["margin2"].max()), float(expected.max()), rel_tol=1e-6)


def test_earlier_stages_count_half_as_much(monkeypatch):
    monkeypatch.setattr("kdtool.methods.ofd.ofd_loss", lambda s, t, m: s.sum() * 0 + 1)
    found = cnn.build("ofd")(cnn.batch_of(cnn.rows(), [0, 1]), 0.5)
    assert float(found.parts["ofd"]) == 1 + 1 / 2 + 1 / 4
