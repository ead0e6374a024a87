"""Relational knowledge distillation: its invariances, and angles in chunks."""

import torch

from kdtool.methods import rkd


def test_relations_are_free_of_place_turn_and_scale():
    t = torch.randn(7, 5)
    turn = torch.linalg.qr(torch.randn(5, 5))[0]
    moved = 3 * t @ turn + torch.randn(5)
    assert rkd.distance_loss(moved, t) < 1e-9
    assert rkd.angle_loss(moved, t) < 1e-9


def test_angles_against_triplets_written_out():
    s, t = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)

    def cosine(x, i, j, k):
        a, b = x[j] - x[i], x[k] - x[i]
        norms = a.norm() * b.norm()
        return (a @ b / norms) if norms > 0 else torch.zeros((), dtype=x.dtype)

    gaps = [(cosine(s, i, j, k) - cosine(t, i, j, k)).abs() for i in range(4) for j in range(4) for k in range(4)]
    huber = torch.stack([gap**2 / 2 if gap < 1 else gap - 0.5 for gap in gaps]).mean()
    torch.testing.assert_close(rkd.angle_loss(s, t), 4 * huber)


def test_chunks_change_nothing(monkeypatch):
    s, t = torch.randn(9, 4, requires_grad=True), torch.randn(9, 6)
    whole = rkd.angle_loss(s, t)
    (expected,) = torch.autograd.grad(whole, s)
    monkeypatch.setattr(rkd, "_LIMIT", 200)
    parts = rkd.angle_loss(s, t)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, s)[0], expected)


def test_one_row_has_no_relations():
    s = torch.randn(1, 4, requires_grad=True)
    (rkd.distance_loss(s, torch.randn(1, 5)) + rkd.angle_loss(s, torch.randn(1, 5))).backward()
    assert not s.grad.any()
