"""One of two processes: losses over the examples of both, their values and gradients written to a file."""

import sys

import torch
import torch.distributed as dist

from kdtool.methods import _terms
from kdtool.methods.cc import cc_loss
from kdtool.methods.dist import dist_terms
from kdtool.methods.pkt import pkt_loss
from kdtool.methods.rkd import angle_loss, distance_loss
from kdtool.methods.sp import sp_loss
from kdtool.tasks._base import ROWS

LOSSES = {
    "distance": distance_loss,
    "angle": angle_loss,
    "sp": sp_loss,
    "pkt": pkt_loss,
    "cc": cc_loss,
    "intra": lambda s, t: dist_terms(s, t)[1],
}


def whole(size, width=6):
    """Student, teacher and row numbers of a batch."""
    generator = torch.Generator().manual_seed(size)
    student, teacher = (torch.randn(size, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randperm(40, generator=generator)[:size]


def main(rank: int, folder: str) -> None:
    """Compute this process's part; process 1 of a batch of one row repeats that row."""
    dist.init_process_group("gloo", f"file://{folder}/door", rank=rank, world_size=2)
    found = {}
    for size in (7, 1):
        student, teacher, rows = (x[rank::2] if size > rank else x[:1] for x in whole(size))
        for name, loss in LOSSES.items():
            own = student.clone().requires_grad_()
            value = _terms.over_everyone(loss, own, teacher, {ROWS: rows})
            gradient = torch.autograd.grad(value, own, allow_unused=True)[0]
            found[f"{name}{size}"] = value.detach(), torch.zeros_like(own) if gradient is None else gradient
    # widths that differ, as lengths do: zeros fill up
    wide, other = whole(4, 6 + rank)[0][rank::2], whole(4)[1][rank::2]
    found["wide"] = _terms.over_everyone(lambda s, t: s.sum() * t.shape[1], wide, other, {ROWS: whole(4)[2][rank::2]})
    torch.save(found, f"{folder}/found{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
