"""Variational information distillation against the density it bounds."""

import torch

from kdtool.methods.vid import vid_loss
from tests.methods import cnn


def test_is_a_gaussian_log_likelihood():
    mean, teacher, scale = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.randn(4)
    variance = torch.nn.functional.softplus(scale) + 1e-5
    normal = torch.distributions.Normal(mean, variance.sqrt()[:, None])
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi))
    expected = (-normal.log_prob(teacher) - constant).mean((1, 2)).sum()
    torch.testing.assert_close(vid_loss(mean, teacher, scale), expected)


def test_variance_starts_at_five():
    method = cnn.build("vid")
    torch.testing.assert_close(torch.nn.functional.softplus(method.scale) + 1e-5, torch.full((16,), 5.0))
    assert "scale" in method.state_dict()
    assert not any(key.startswith("predict") for key in method.finish().state_dict())
