"""Masked generative distillation: rebuild the teacher's features from part of the student's.

    sum over examples of sum over channels and positions of (G(m * R(F_s)) - F_t)^2

m is 0 for a random share `mask_ratio` of the channels of each example, else 1; G is two 3x3
convolutions with ReLU between, R a 1x1 convolution where the widths differ (equations 3 to 6 of the
paper, with the channel mask of its classification experiments). R and G are thrown away. In eval
mode nothing is masked.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kdtool.data.examples import Examples
from kdtool.methods import _maps, _terms
from kdtool.tasks._base import Batch


@_maps.full_precision
def mgd_loss(generated: Tensor, teacher: Tensor) -> Tensor:
    """Sum of squared differences of [N, C, H, W] over everything."""
    return (generated - teacher).square().sum()


def channel_mask(features: Tensor, ratio: float) -> Tensor:
    """1 for kept channels, 0 for a share `ratio` of them at random: [N, C, 1, 1]."""
    kept = torch.rand(features.shape[:2], device=features.device) >= ratio
    return kept[:, :, None, None].to(features.dtype)


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    mgd_weight: Annotated[float, Field(ge=0)] = 7e-05
    """Weight of the error, which is a sum over all channels and positions."""
    mask_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.15
    """Share of channels masked, the paper's lambda."""
    student_tap: str = "-1"
    """Tap of the student: `pooled`, a stage number such as -1, or a module path."""
    teacher_tap: str = "-1"
    """Tap of the teacher: `pooled`, a stage number such as -1, or a module path."""


class Method(_maps.PairMethod):
    """Masked generative distillation: rebuild the teacher's features from part of the student's."""

    paper: ClassVar[str] = "Yang et al.: Masked Generative Distillation, 2022, arXiv:2205.01529"
    tasks: ClassVar[frozenset[str]] = frozenset({"image-classification"})
    mixes: ClassVar[bool] = True
    needs: ClassVar[str] = "feature maps with height and width"
    golden: ClassVar[str] = "no reference values exist: checked against its formula in tests/methods/test_mgd.py"
    minimum: ClassVar[str] = "the generator starts at random"

    def build(self, student: _terms.Side, teacher: _terms.Side | None, data: Examples) -> None:
        """Make the alignment and the generator."""
        assert teacher is not None
        before, after = self.channels(student, teacher)
        self.align: nn.Module = nn.Identity() if before == after else nn.Conv2d(before, after, 1)
        self.generate = nn.Sequential(
            nn.Conv2d(after, after, 3, padding=1), nn.ReLU(), nn.Conv2d(after, after, 3, padding=1)
        )

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The error of what is rebuilt."""
        assert teacher is not None
        s, t = _maps.maps_of(student, teacher, self.points)
        s = self.align(s)
        if self.training:
            s = s * channel_mask(s, self.config.mask_ratio)
        return [_terms.Term("mgd", self.config.mgd_weight, mgd_loss(self.generate(s), t))]
