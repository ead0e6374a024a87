"""Contrastive representation distillation: negatives, memories, normalisers."""

import numpy as np
import pytest
import torch

from kdtool.methods import crd
from tests.methods import cnn

LABELS = torch.from_numpy(np.arange(12) % 3)


@pytest.mark.parametrize("source", ["other-classes", "all"])
def test_negatives_are_all_rows_that_may_be(source):
    method = cnn.build("crd", negatives=10, negatives_from=source)
    rows = torch.arange(12).repeat(200)
    index = method.draw(rows, LABELS[rows])
    assert torch.equal(index[:, 0], rows)
    assert index.shape == (2400, 11)
    drawn = {int(n) for n in index[LABELS[rows] == 1, 1:].flatten()}
    assert drawn == ({n for n in range(12) if n % 3 != 1} if source == "other-classes" else set(range(12)))
    counts = index[LABELS[rows] == 1, 1:].flatten().bincount(minlength=12)
    wanted = counts[counts > 0].float()
    assert wanted.std() / wanted.mean() < 0.1, "not uniform"


def test_one_class_alone_draws_from_all_rows():
    data = cnn.rows()
    data.columns["labels"][:] = 1
    method = cnn.build("crd", data=data)
    index = method.draw(torch.arange(12), torch.ones(12, dtype=torch.long))
    assert index.min() >= 0
    assert index.max() < 12


def test_negatives_are_at_most_the_rows():
    method = cnn.build("crd")
    assert method.config.negatives == 16384
    assert method.draw(torch.arange(4), LABELS[:4]).shape == (4, 13)


def test_memories_move_in_training_only():
    method = cnn.build("crd", momentum=0.25).eval()
    batch = cnn.batch_of(cnn.rows(), [4, 7])
    before = {name: value.clone() for name, value in method.state_dict().items() if name[:2] in ("me", "z_")}
    method(batch, 0.5)
    assert all(torch.equal(method.state_dict()[name], value) for name, value in before.items())
    method.train()
    method(batch, 0.5)
    for name in ("memory_s", "memory_t"):
        now = method.state_dict()[name]
        changed = (now != before[name]).any(1)
        assert changed.nonzero().flatten().tolist() == [4, 7]
        torch.testing.assert_close(now.norm(dim=1), torch.ones(12))
    first = method.z_s.clone()
    assert first > 0
    method(batch, 0.5)
    assert torch.equal(method.z_s, first), "the normaliser is that of the first batch"


def test_scores_against_rows_copied():
    v, memory = torch.randn(3, 4), torch.randn(6, 4)
    index = torch.randint(6, (3, 5))
    expected = torch.einsum("nd,nkd->nk", v, memory[index]).div(0.5).exp()
    torch.testing.assert_close(crd.scores(v, memory, index, 0.5), expected)


def test_pulling_together_lowers_the_loss():
    h = torch.ones(2, 5)
    closer = h.clone()
    closer[:, 0] = 3
    assert crd.contrast_loss(closer, 10) < crd.contrast_loss(h, 10)
