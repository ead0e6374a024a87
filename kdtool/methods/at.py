"""Attention transfer: the student must look where the teacher looks.

    sum over examples, sum over stages, mean over positions of (A(F_s) - A(F_t))^2

A is the mean over channels of |F|^p at each position, flattened and scaled to length 1 (section 3.1
of the paper, F^p_sum). Of two maps the larger is average-pooled to the smaller.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kdtool.methods import _maps, _terms
from kdtool.tasks._base import Batch


def _attention(features: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Attention [N, P], of length 1 over the real positions."""
    strength = features.abs().pow(p).mean(1)
    return functional.normalize(strength if mask is None else strength * mask.to(strength.dtype), dim=1)


@_maps.full_precision
def at_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None, p: float = 2.0) -> Tensor:
    """Mean squared difference of the attention of each example, summed over examples.

    Args:
        student: [N, C_s, P]
        teacher: [N, C_t, P], detached.
        mask: [N, P] real positions, or None where all are.
        p: Power of the activations.
    """
    difference = (_attention(student, mask, p) - _attention(teacher, mask, p)).square()
    return _maps.mean_over_positions(difference, mask).sum()


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    at_weight: Annotated[float, Field(ge=0)] = 1000.0
    """Weight of the difference of attention."""
    power: Annotated[float, Field(ge=1)] = 2.0
    """Power p of the activations."""
    student_taps: list[str] | None = None
    """Taps of the student from shallow to deep; empty for its last stages, as many as the teacher has, too."""
    teacher_taps: list[str] | None = None
    """Taps of the teacher, as many."""


class Method(_maps.StagesMethod):
    """Attention transfer: the student must look where the teacher looks."""

    paper: ClassVar[str] = "Zagoruyko, Komodakis: Paying More Attention to Attention, 2017, arXiv:1612.03928"
    tasks: ClassVar[frozenset[str]] = frozenset({"text-classification", "image-classification", "audio-classification"})
    mixes: ClassVar[bool] = True
    needs: ClassVar[str] = "features at several positions, such as pixels, tokens or frames"

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The differences of all stages, summed."""
        assert teacher is not None
        found = []
        for points in self.pairs:
            s, t, mask = _maps.positions_of(student, teacher, points, batch)
            found.append(at_loss(s, t, mask, self.config.power))
        return [_terms.Term("at", self.config.at_weight, torch.stack(found).sum())]
