"""Losses that couple the examples of a batch see those of all processes."""

import subprocess
import sys

import pytest
import torch

from tests.methods.coupled import LOSSES, whole


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    words = [sys.executable, "-m", "tests.methods.coupled"]
    running = [subprocess.Popen([*words, str(rank), str(folder)]) for rank in (0, 1)]
    assert [one.wait(600) for one in running] == [0, 0]
    return [torch.load(folder / f"found{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_give_the_loss_and_gradient_of_one(found, name):
    student, teacher, _ = whole(7)
    student.requires_grad_()
    expected = LOSSES[name](student, teacher)
    (gradient,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(sum(part[f"{name}7"][0] for part in found), expected.detach())
    joined = torch.empty_like(gradient)
    joined[::2], joined[1::2] = found[0][f"{name}7"][1], found[1][f"{name}7"][1]
    torch.testing.assert_close(joined, gradient)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_that_two_processes_run_counts_once(found, name):
    student, teacher, _ = whole(1)
    torch.testing.assert_close(sum(part[f"{name}1"][0] for part in found), LOSSES[name](student, teacher).detach())


def test_zeros_fill_up_to_the_widest(found):
    parts = [whole(4, 6 + rank)[0][rank::2].sum() for rank in (0, 1)]
    torch.testing.assert_close(sum(part["wide"] for part in found), 6 * sum(parts))
