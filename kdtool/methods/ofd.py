"""Overhaul of feature distillation: the teacher's activated features, with a margin for the rest.

    sum over examples, sum over stages l = 0 ... L-1 of 2^-(L-l-1) * d(R(F_s), max(F_t, m))

on maps before the ReLU, with the partial distance d (equation 5 of the paper) that leaves elements
alone where the teacher is off and the student lies below: (s - t)^2 unless s <= t <= 0. The margin
m_c is the mean of what the teacher's batch norm gives below 0 (equations 2 and 3), a Gaussian with
mean b and standard deviation |w|: m = b - |w| * phi(b / w) / Phi(-b / |w|). R is a 1x1 convolution
with batch norm, trained and thrown away.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kdtool.data.examples import Examples
from kdtool.features import PRE, as_map, resolve_tap
from kdtool.methods import _maps, _terms
from kdtool.modeling.simkd import PatientBatchNorm
from kdtool.tasks._base import Batch

_RARE = 0.001
"""Below this share of values under 0, the margin is three standard deviations under 0."""


@_maps.full_precision
def ofd_loss(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Partial squared distance, summed over all elements.

    Args:
        student: Connected maps before the ReLU [N, C, H, W].
        teacher: Maps before the ReLU [N, C, H, W], detached.
        margin: [1, C, 1, 1], at most 0.
    """
    target = torch.maximum(teacher, margin)
    counts = (student > target) | (target > 0)
    return ((student - target).square() * counts).sum()


def margin_of(weight: Tensor, bias: Tensor) -> Tensor:
    """E[x | x < 0] of x ~ N(bias, weight^2) for each channel; at most 0, also where the weight is 0.

    Args:
        weight: Scales of a batch norm [C].
        bias: Its shifts [C].
    """
    spread, mean = weight.double().abs(), bias.double()
    ratio = mean / spread.clamp_min(1e-12)
    below = torch.special.ndtr(-ratio)
    density = torch.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)
    inside = mean - spread * density / below.clamp_min(_RARE)
    return torch.where(below > _RARE, inside, -3 * spread).clamp_max(0).to(weight.dtype)


def seen_margin(value: Tensor) -> Tensor:
    """The same from a batch of maps [N, C, H, W], for teachers without batch norm: [C]."""
    below = (value < 0).to(value.dtype)
    return (value * below).sum((0, 2, 3)) / below.sum((0, 2, 3)).clamp_min(1)


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    ofd_weight: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the distance, which is a sum over all elements."""
    student_taps: list[str] | None = None
    """Taps of the student from shallow to deep; empty for its last stages before their last ReLU."""
    teacher_taps: list[str] | None = None
    """Taps of the teacher, as many."""


class Method(_maps.StagesMethod):
    """Overhaul of feature distillation: the teacher's activated features, with a margin."""

    paper: ClassVar[str] = "Heo et al.: A Comprehensive Overhaul of Feature Distillation, 2019, arXiv:1904.01866"
    tasks: ClassVar[frozenset[str]] = frozenset({"image-classification"})
    mixes: ClassVar[bool] = True
    needs: ClassVar[str] = "feature maps with height and width"
    minimum: ClassVar[str] = "the connectors start at random"
    tap_prefix = PRE

    def build(self, student: _terms.Side, teacher: _terms.Side | None, data: Examples) -> None:
        """Make connectors, and margins from the teacher's batch norms."""
        assert teacher is not None
        connectors = []
        for number, (mine, theirs) in enumerate(self.pairs):
            before, target = _maps.channels_of(student.taps[mine]), as_map(teacher.taps[theirs])
            after = target.shape[1]
            connectors.append(nn.Sequential(nn.Conv2d(before, after, 1, bias=False), PatientBatchNorm(after)))
            norm = last_norm(teacher.model, theirs, after)
            margin = seen_margin(target.float()) if norm is None else margin_of(norm.weight, norm.bias)
            self.register_buffer(f"margin{number}", margin.detach().clone()[None, :, None, None])
        self.connectors = nn.ModuleList(connectors)

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The distances of all stages, each counting half as much as the next."""
        assert teacher is not None
        found = []
        for number, (points, connect) in enumerate(zip(self.pairs, self.connectors, strict=True)):
            s, t = _maps.maps_of(student, teacher, points)
            value = ofd_loss(connect(s), t, self.get_buffer(f"margin{number}"))
            found.append(value * 2.0 ** (number + 1 - len(self.pairs)))
        return [_terms.Term("ofd", self.config.ofd_weight, torch.stack(found).sum())]


def last_norm(model: nn.Module, point: str, channels: int) -> Any:
    """The last batch norm of that many channels inside what a tap names, None where there is none."""
    inside: Sequence[nn.Module] = list(model.get_submodule(resolve_tap(model, point.removeprefix(PRE))).modules())
    norms = [m for m in inside if isinstance(m, nn.BatchNorm2d) and m.num_features == channels and m.affine]
    return norms[-1] if norms else None
