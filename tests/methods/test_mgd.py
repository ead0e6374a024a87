"""Masked generative distillation: the mask, and the sum."""

import torch

from kdtool.methods.mgd import channel_mask, mgd_loss
from tests.methods import cnn


def test_masks_whole_channels_of_each_example():
    torch.manual_seed(0)
    mask = channel_mask(torch.randn(64, 32, 3, 3), 0.25)
    assert mask.shape == (64, 32, 1, 1)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert abs(float(mask.mean()) - 0.75) < 0.05
    assert len({tuple(row.flatten().tolist()) for row in mask}) > 60


def test_is_a_sum_and_masks_in_training_only():
    s, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(mgd_loss(s, t), ((s - t) ** 2).sum())
    method = cnn.build("mgd", mask_ratio=0.5)
    batch = cnn.batch_of(cnn.rows(), [0, 1, 2])
    assert method.eval()(batch, 0.5).total == method(batch, 0.5).total
    method.train()
    method.student.eval()
    assert method(batch, 0.5).total != method(batch, 0.5).total
