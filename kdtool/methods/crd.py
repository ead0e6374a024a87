"""Contrastive representation distillation: tell the teacher's view of an example from others'.

Embeddings v of length 1 (a linear layer of each side) are compared with memory banks that hold an
embedding of every training row from both sides:

    h(v, u) = exp(v . u / tau) / Z
    loss of an anchor = -log h+ / (h+ + K/n) - sum over K negatives of log (K/n) / (h- + K/n)

(equations 10, 18 and 19 of the paper, with noise-contrastive estimation as in the public code), for
the student's v against the teacher's memory and the teacher's against the student's. Z is n times
the mean of exp(v . u / tau) in the first batch. The memories then move towards the new embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from kdtool.data.examples import Examples
from kdtool.methods import _maps, _terms
from kdtool.models import Loaded
from kdtool.tasks._base import LABELS, Batch, Task

_EPS = 1e-7


@_maps.full_precision
def scores(embedding: Tensor, memory: Tensor, index: Tensor, tau: float) -> Tensor:
    """exp(v . u / tau) of each anchor with chosen rows of a memory.

    All rows are multiplied and the wanted ones picked: copying K rows for each anchor would take
    more memory than the products with all n.

    Args:
        embedding: Anchors [N, D], of length 1.
        memory: [n, D], of length 1.
        index: Rows of the memory [N, 1 + K]; column 0 is the anchor's own.
        tau: Temperature.
    """
    return (embedding @ memory.T / tau).gather(1, index).exp()


@_maps.full_precision
def contrast_loss(positive_first: Tensor, rows: int) -> Tensor:
    """Noise-contrastive loss, summed over anchors.

    Args:
        positive_first: h of the positive and K negatives [N, 1 + K].
        rows: n, rows of the memory.
    """
    noise = (positive_first.shape[1] - 1) / rows
    positive, negative = positive_first[:, 0], positive_first[:, 1:]
    own = (positive / (positive + noise + _EPS)).log().sum()
    others = (noise / (negative + noise + _EPS)).log().sum()
    return -(own + others)


def moved(memory: Tensor, rows: Tensor, embedding: Tensor, momentum: float) -> Tensor:
    """New values [N, D] of some rows of a memory [n, D]: moved to the embeddings [N, D], of length 1."""
    return functional.normalize(memory[rows] * momentum + embedding.to(memory.dtype) * (1 - momentum), dim=1)


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    crd_weight: Annotated[float, Field(ge=0)] = 0.8
    """Weight of the contrastive loss of both sides."""
    negatives: Annotated[int, Field(ge=1)] = 16384
    """K, negatives of each example; at most as many as there are training rows."""
    negatives_from: Literal["other-classes", "all"] = "other-classes"
    """Where negatives are drawn: rows of other classes, or all rows."""
    width: Annotated[int, Field(ge=1)] = 128
    """Width of the embeddings."""
    tau: Annotated[float, Field(gt=0)] = 0.07
    """Temperature of the similarities."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the old memory that stays when a row is seen."""
    student_tap: str = "pooled"
    """Tap of the student: `pooled`, a stage number such as -1, or a module path."""
    teacher_tap: str = "pooled"
    """Tap of the teacher: `pooled`, a stage number such as -1, or a module path."""


class Method(_maps.PairMethod):
    """Contrastive representation distillation: tell the teacher's view of an example from others'."""

    paper: ClassVar[str] = "Tian, Krishnan, Isola: Contrastive Representation Distillation, 2020, arXiv:1910.10699"
    tasks: ClassVar[frozenset[str]] = frozenset(
        {"text-classification", "image-classification", "audio-classification", "tabular-classification"}
    )
    batchwise: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = True
    minimum: ClassVar[str] = "other examples are pushed apart whatever the student says"

    def __init__(self, config: Config, student: Loaded, teachers: Sequence[Loaded], task: Task) -> None:
        super().__init__(config, student, teachers, task)
        self.size = 0

    def build(self, student: _terms.Side, teacher: _terms.Side | None, data: Examples) -> None:
        """Make both embeddings, both memories, and the order in which negatives are found."""
        assert teacher is not None
        width = self.config.width
        before, after = self.channels(student, teacher)
        self.embed_s, self.embed_t = nn.Linear(before, width), nn.Linear(after, width)
        self.size = len(data)
        for name in ("memory_s", "memory_t"):
            self.register_buffer(name, functional.normalize(torch.rand(self.size, width) * 2 - 1, dim=1))
        # 0 until the first batch has told them
        self.register_buffer("z_s", torch.zeros(()))
        self.register_buffer("z_t", torch.zeros(()))
        labels = torch.from_numpy(np.asarray(data.columns[LABELS], dtype=np.int64))
        counts = labels.bincount(minlength=int(student.logits.shape[-1]))
        if self.config.negatives_from == "all" or int(counts.max()) == self.size:
            counts = torch.zeros_like(counts)
        # rows sorted by class: those of other classes follow the last of one's own, around the end
        self.register_buffer("order", labels.argsort(stable=True), persistent=False)
        self.register_buffer("stops", counts.cumsum(0), persistent=False)
        self.register_buffer("counts", counts, persistent=False)

    def draw(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Rows of the memories to compare with [N, 1 + K]: the example's own, then negatives, drawn anew."""
        shape = len(rows), min(self.config.negatives, self.size)
        counts, stops, order = self.get_buffer("counts"), self.get_buffer("stops"), self.get_buffer("order")
        others = (self.size - counts[labels])[:, None]
        # numbers below 2^62 from the generator of all the run's randomness; the bias of the remainder is nil
        drawn = torch.randint(2**62, shape, device=rows.device) % others
        negatives = order[(stops[labels][:, None] + drawn) % self.size]
        return torch.cat([rows[:, None], negatives], dim=1)

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The contrastive losses of both anchors."""
        assert teacher is not None
        f_s, f_t = self.vectors(student, teacher, batch)
        v_s = functional.normalize(self.embed_s(f_s).float(), dim=1)
        v_t = functional.normalize(self.embed_t(f_t).float(), dim=1)
        rows = _terms.rows_of(batch)
        index = self.draw(rows, labels)
        memory_s, memory_t = self.get_buffer("memory_s"), self.get_buffer("memory_t")
        # the graph keeps the memories as they are now
        h_s = scores(v_s, memory_t.clone(), index, self.config.tau)
        h_t = scores(v_t, memory_s.clone(), index, self.config.tau)
        loss_s = contrast_loss(h_s / self._normaliser("z_s", h_s), self.size)
        loss_t = contrast_loss(h_t / self._normaliser("z_t", h_t), self.size)
        if self.training:
            self._remember(rows, v_s.detach(), v_t.detach())
        weight = self.config.crd_weight
        return [_terms.Term("student_anchor", weight, loss_s), _terms.Term("teacher_anchor", weight, loss_t)]

    @torch.no_grad()
    def _remember(self, rows: Tensor, v_s: Tensor, v_t: Tensor) -> None:
        for name, embedding in (("memory_s", v_s), ("memory_t", v_t)):
            memory = self.get_buffer(name)
            memory[rows] = moved(memory, rows, embedding, self.config.momentum)

    def _normaliser(self, name: str, found: Tensor) -> Tensor:
        """Z: what the first training batch gave, or what this one gives while there was none."""
        known = self.get_buffer(name)
        value = torch.where(known > 0, known, found.detach().mean() * self.size)
        if self.training:
            known.copy_(value)
        return value
