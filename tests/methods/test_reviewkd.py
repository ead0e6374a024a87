"""Knowledge review: the context loss and the fusion."""

import torch
from torch.nn import functional

from kdtool.methods.reviewkd import Fusion, hcl_loss
from tests.methods import cnn


def test_levels_as_large_as_the_map_are_left_out():
    s, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    mean = functional.mse_loss(s, t)
    pooled = [functional.mse_loss(*(functional.adaptive_avg_pool2d(x, k) for x in (s, t))) for k in (2, 1)]
    expected = 3 * (mean + pooled[0] / 2 + pooled[1] / 4) / (1 + 1 / 2 + 1 / 4)
    torch.testing.assert_close(hcl_loss(s, t), expected)
    s, t = s.mean((2, 3), keepdim=True), t.mean((2, 3), keepdim=True)
    torch.testing.assert_close(hcl_loss(s, t), 3 * functional.mse_loss(s, t))


def test_fusion_mixes_with_the_deeper_map_and_fits_the_teacher():
    fuse = Fusion(4, 6, 10, deepest=False).eval()
    out, passed = fuse(torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4), (16, 16))
    assert out.shape == (2, 10, 16, 16)
    assert passed.shape == (2, 6, 8, 8)


def test_default_taps_are_all_stages_and_the_vector():
    method = cnn.build("reviewkd", width=5)
    assert method.student_taps == ("pre:-3", "pre:-2", "pre:-1", "pooled")
    assert [f.gate is None for f in method.fusions] == [False, False, False, True]
    assert method.fusions[0].enter[0].out_channels == 5
