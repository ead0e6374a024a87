"""Knowledge review: the student's stages, fused from deep to shallow, must meet the teacher's.

Going from the deepest stage to the first, each map of the student is brought to a common width,
mixed with what came from the deeper stages by a learnt gate at each position, and brought to the
width of the teacher's map (attention-based fusion, figure 3a of the paper). Each result is compared
with the teacher's map on several scales (hierarchical context loss, figure 3b):

    hcl = (mse + sum over levels k of 2^-i * mse of both maps pooled to k x k) / (1 + sum of 2^-i)

levels that are not smaller than the map are left out. All that is fused is thrown away.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from kdtool.data.examples import Examples
from kdtool.features import POOLED, PRE, as_map
from kdtool.methods import _maps, _terms
from kdtool.modeling.simkd import PatientBatchNorm
from kdtool.models import Loaded
from kdtool.tasks._base import Batch, Task


@_maps.full_precision
def hcl_loss(student: Tensor, teacher: Tensor, levels: Sequence[int] = (4, 2, 1)) -> Tensor:
    """Hierarchical context loss, the mean over each example's elements summed over examples.

    Args:
        student: [N, C, H, W]
        teacher: [N, C, H, W], detached.
        levels: Sides of the pooled maps, from large to small.
    """
    total, weights, factor = functional.mse_loss(student, teacher), 1.0, 1.0
    for level in levels:
        if level >= student.shape[2]:
            continue
        factor /= 2
        pooled = [functional.adaptive_avg_pool2d(value, (level, level)) for value in (student, teacher)]
        total = total + factor * functional.mse_loss(pooled[0], pooled[1])
        weights += factor
    return total / weights * len(student)


class Fusion(nn.Module):
    """One stage of the review: 1x1 to `middle`, gate with the deeper map, 3x3 to `after` channels."""

    def __init__(self, before: int, middle: int, after: int, deepest: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(before, middle, 1, bias=False), PatientBatchNorm(middle))
        self.gate = None if deepest else nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid())
        self.leave = nn.Sequential(nn.Conv2d(middle, after, 3, padding=1, bias=False), PatientBatchNorm(after))

    def forward(self, x: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The map in the teacher's width and size, and the fused one that goes on to the next stage.

        Args:
            x: The student's map [N, before, h, w].
            deeper: The fused map of the next deeper stage [N, middle, h', w'], None for the deepest.
            size: Height and width of the teacher's map.
        """
        x = self.enter(x)
        if self.gate is not None and deeper is not None:
            deeper = functional.interpolate(deeper, size=x.shape[2:], mode="nearest")
            share = self.gate(torch.cat([x, deeper], dim=1))
            x = x * share[:, :1] + deeper * share[:, 1:]
        fitted = x if list(x.shape[2:]) == list(size) else functional.interpolate(x, size=list(size), mode="nearest")
        return self.leave(fitted), x


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    review_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the summed context losses; toolboxes use 0.6 to 5, depending on the pair."""
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of training over which the terms then rise linearly to their weights."""
    levels: list[int] | None = None
    """Sides of the pooled maps; empty for 4, 2, 1."""
    width: Annotated[int, Field(ge=1)] = 256
    """Common width of the fused maps, at most that of the student's widest."""
    student_taps: list[str] | None = None
    """Taps of the student from shallow to deep; empty for its last stages before their ReLU, and `pooled`."""
    teacher_taps: list[str] | None = None
    """Taps of the teacher, as many."""


class Method(_maps.StagesMethod):
    """Knowledge review: the student's stages, fused from deep to shallow, must meet the teacher's."""

    paper: ClassVar[str] = "Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review, 2021, arXiv:2104.09044"
    tasks: ClassVar[frozenset[str]] = frozenset({"image-classification"})
    mixes: ClassVar[bool] = True
    needs: ClassVar[str] = "feature maps with height and width"
    minimum: ClassVar[str] = "the fusion starts at random"
    tap_prefix = PRE

    def __init__(self, config: Config, student: Loaded, teachers: Sequence[Loaded], task: Task) -> None:
        super().__init__(config, student, teachers, task)
        if config.student_taps is None and config.teacher_taps is None:
            self.student_taps, self.teacher_taps = (*self.student_taps, POOLED), (*self.teacher_taps, POOLED)
            self.pairs = list(zip(self.student_taps, self.teacher_taps, strict=True))
        self.levels = tuple(config.levels or (4, 2, 1))

    def build(self, student: _terms.Side, teacher: _terms.Side | None, data: Examples) -> None:
        """Make the fusion of each stage."""
        assert teacher is not None
        before = [_maps.channels_of(student.taps[mine]) for mine, _ in self.pairs]
        after = [_maps.channels_of(teacher.taps[theirs]) for _, theirs in self.pairs]
        middle = min(self.config.width, max(before))
        last = len(before) - 1
        self.fusions = nn.ModuleList(
            Fusion(left, middle, right, i == last) for i, (left, right) in enumerate(zip(before, after, strict=True))
        )

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The context losses of all stages, summed."""
        assert teacher is not None
        found: list[Tensor] = []
        deeper: Tensor | None = None
        for (mine, theirs), fuse in zip(reversed(self.pairs), reversed(self.fusions), strict=True):
            target = as_map(teacher.taps[theirs])
            fitted, deeper = fuse(as_map(student.taps[mine]), deeper, target.shape[2:])
            found.append(hcl_loss(fitted, target, self.levels))
        return [_terms.Term("review", self.config.review_weight, torch.stack(found).sum())]
