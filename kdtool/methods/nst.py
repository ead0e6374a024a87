"""Neuron selectivity transfer: the patterns of the channels must be distributed alike.

    sum over examples of mean k(F_t, F_t) + mean k(F_s, F_s) - 2 mean k(F_s, F_t),   k(a, b) = (a . b)^2

the squared maximum mean discrepancy with a polynomial kernel between the sets of channels, each
flattened and scaled to length 1 (equations 4 and 6 of the paper). Numbers of channels may differ.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kdtool.methods import _maps, _terms
from kdtool.tasks._base import Batch


def _kernel(left: Tensor, right: Tensor) -> Tensor:
    """Mean of (a . b)^2 over all pairs of channels, [N]."""
    return (left @ right.transpose(1, 2)).square().mean((1, 2))


@_maps.full_precision
def nst_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared discrepancy of each example, summed over examples.

    Args:
        student: [N, C_s, P], padding set to 0.
        teacher: [N, C_t, P], detached.
    """
    s, t = functional.normalize(student, dim=2), functional.normalize(teacher, dim=2)
    return (_kernel(t, t) + _kernel(s, s) - 2 * _kernel(s, t)).sum()


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    nst_weight: Annotated[float, Field(ge=0)] = 50.0
    """Weight of the discrepancy."""
    student_tap: str = "-1"
    """Tap of the student: `pooled`, a stage number such as -1, or a module path."""
    teacher_tap: str = "-1"
    """Tap of the teacher: `pooled`, a stage number such as -1, or a module path."""


class Method(_maps.PairMethod):
    """Neuron selectivity transfer: the patterns of the channels must be distributed alike."""

    paper: ClassVar[str] = (
        "Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017, arXiv:1707.01219"
    )
    tasks: ClassVar[frozenset[str]] = frozenset({"text-classification", "image-classification", "audio-classification"})
    mixes: ClassVar[bool] = True
    needs: ClassVar[str] = "features at several positions, such as pixels, tokens or frames"

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The discrepancy."""
        assert teacher is not None
        s, t, mask = _maps.positions_of(student, teacher, self.points, batch)
        if mask is not None:
            real = mask.unsqueeze(1).to(s.dtype)
            s, t = s * real, t * real
        return [_terms.Term("nst", self.config.nst_weight, nst_loss(s, t))]
