"""Distances between next-token distributions over different vocabularies, with gradients written out.

Boizard et al. (2024, arXiv:2402.12030), equation 5: the L1 distance of the probabilities sorted by size, the
shorter vocabulary filled up with zeros.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kdtool.divergences._tokens import Divergence, centred, normalize_
from kdtool.divergences._top_k import TopK


def _sorted_apart(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Distance [rows] of sorted q [rows, V] and p [rows, W], and its derivative by q."""
    ranked, places = q.sort(-1, descending=True)
    other = p.sort(-1, descending=True).values
    width = min(q.shape[1], p.shape[1])
    value = other[:, width:].sum(-1)
    slope = torch.ones_like(ranked)  # beyond the teacher's vocabulary its probability is 0
    apart = ranked[:, :width] - other[:, :width]
    slope[:, :width] = apart.sign()
    value += apart.abs().sum(-1) + ranked[:, width:].sum(-1)
    return value, torch.empty_like(q).scatter_(1, places, slope)


@dataclass(frozen=True, slots=True)
class Universal:
    """Universal logit distance.

    Attributes:
        temperature: Divides both logits.
    """

    temperature: float = 1.0
    block: ClassVar[int | None] = None
    aligned: ClassVar[bool] = False

    def rows(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Values [rows] and gradient [rows, V] of logits [rows, V] and [rows, W], which are overwritten."""
        q, p = (normalize_(z.div_(self.temperature)) for z in (student, teacher))
        value, slope = _sorted_apart(q, p)
        return value, centred(q, slope)[1].div_(self.temperature)


@dataclass(frozen=True, slots=True, eq=False)
class Matched:
    """A divergence on tokens that both vocabularies have, and the universal distance on those that one has.

    Attributes:
        student_ids: Of the tokens that both have, [matches].
        teacher_ids: The same tokens' ids of the teacher.
        which: Compares them; all others are one outcome. Its temperature divides all logits.
        weight: Of the universal distance, beside the divergence with weight 1.
    """

    student_ids: Tensor
    teacher_ids: Tensor
    which: Divergence
    weight: float = 1.0
    block: ClassVar[int | None] = None
    aligned: ClassVar[bool] = False

    def rows(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Values [rows] and gradient [rows, V] of logits [rows, V] and [rows, W], which are overwritten."""
        rows = len(student)
        p = normalize_(teacher.div_(self.which.temperature))
        kept = teacher[:, self.teacher_ids]
        p[:, self.teacher_ids] = 0.0
        told = TopK(kept, self.student_ids.expand(rows, -1), p.sum(-1).log())
        q = normalize_(student.div(self.which.temperature))
        value, gradient = told.apart(student, self.which)
        if not self.weight:
            return value, gradient
        alone = q.clone()
        alone[:, self.student_ids] = 0.0
        distance, slope = _sorted_apart(alone, p)
        slope[:, self.student_ids] = 0.0
        gradient.add_(centred(q, slope)[1], alpha=self.weight / self.which.temperature)
        return value.add_(distance, alpha=self.weight), gradient
