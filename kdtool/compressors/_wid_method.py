"""Training compactors, as a method that the loop of `distill` trains (WID, sections 3.3 and 3.4)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdtool.compressors import _wid_merge as merging
from kdtool.compressors._wid_anatomy import Anatomy
from kdtool.compressors._wid_schedule import (
    DIM_INTERVALS,
    Strategy,
    column_norms,
    dense_drops,
    keep_attention,
    keep_smallest_out,
)
from kdtool.compressors._wid_step import PenalisedAdamW
from kdtool.divergences import cross_entropy
from kdtool.methods import _base
from kdtool.models import Loaded
from kdtool.sections import TrainSection
from kdtool.tasks._base import Batch, Task


@dataclass(frozen=True, slots=True)
class Goal:
    """What is to come of the model.

    Attributes:
        hidden: Dimensions H_s of the residual stream to keep; the feed-forward width shrinks by the same share.
        strategy: `dim` makes every head smaller, `head` drops whole heads.
        interval: Steps w between two choices of what to drop.
        strength: lambda of the penalty.
        freeze: Keep-sets that have reached their targets stay.
        schedule: Intervals after which they have.
    """

    hidden: int
    strategy: Strategy
    interval: int
    strength: float
    freeze: bool
    schedule: int


class Inheritance(_base.Method):
    """A model between compactors, most of whose rows and columns shrink to nothing while the task's loss holds.

    Args:
        goal: What is to come of it.
        loaded: The model, which stays as it is; this trains a copy.
        anatomy: Of the model.
        task: Gives the loss: cross-entropy with its labels.
    """

    reads_teacher: ClassVar[bool] = False
    teachers: ClassVar[tuple[int, int]] = (0, 0)

    def __init__(self, goal: Goal, loaded: Loaded, anatomy: Anatomy, task: Task) -> None:
        wrapped = merging.compacted(loaded.model, anatomy)
        super().__init__(goal, Loaded(wrapped, loaded.processor, loaded.ref), [], task)
        self.anatomy = anatomy
        for group, size in anatomy.sizes.items():
            self.register_buffer(_buffer(group), torch.ones(size, dtype=torch.bool))
        self._optimizer: PenalisedAdamW | None = None

    @property
    def keep(self) -> dict[str, Tensor]:
        """Keep-set to bool [n]."""
        return {group: getattr(self, _buffer(group)) for group in self.anatomy.sizes}

    def is_own_weight(self, name: str) -> bool:
        """Whether a parameter, by its name here, is one of the model and no compactor."""
        return name.rpartition(".")[2] not in merging.COMPACTORS

    def optimizer(self, groups: list[dict[str, Any]], config: TrainSection, device: str) -> torch.optim.Optimizer:
        """AdamW with the penalty in its moments."""
        roles: Any = merging.roles_of(self.student, self.anatomy)
        self._optimizer = PenalisedAdamW(groups, roles, self.config.strength)
        return self._optimizer

    def enter(self, stage: str, resumed: bool) -> None:
        """Norms hold masks of their own, which a checkpoint does not."""
        merging.set_masks(self.student, self.anatomy, self.keep)

    def before_step(self, step: int) -> None:
        """Choose anew what to drop where an interval ends; published steps count from 1."""
        assert self._optimizer is not None
        passed, rest = divmod(step + 1, self.config.interval)
        if passed and not rest and not (self.config.freeze and passed > self.config.schedule):
            self.choose(passed)
        self._optimizer.phase = "active" if step + 1 > self.config.interval else "warm"
        self._optimizer.masks = self.keep

    @torch.no_grad()
    def choose(self, passed: int) -> None:
        """Set all masks by the norms of today's compactors.

        Args:
            passed: Intervals k of the schedule.
        """
        goal, anatomy = self.config, self.anatomy
        compactors = merging.compactors_of(self.student, anatomy)
        each = (anatomy.hidden - goal.hidden) // anatomy.heads
        for group, size in anatomy.sizes.items():
            scores = column_norms(compactors[f"{anatomy.judge(group)}_in"])
            if group == "hidden" or group.startswith("attn."):
                found = keep_attention(
                    scores, passed, goal.hidden, anatomy.head_size, goal.strategy, fractional=each < DIM_INTERVALS
                )
            else:
                target = goal.hidden * size // anatomy.hidden
                found = keep_smallest_out(scores, dense_drops(passed, size, target))
            getattr(self, _buffer(group)).copy_(found)
        merging.set_masks(self.student, anatomy, self.keep)

    def keep_all(self) -> None:
        """Drop nothing, as in the beginning."""
        for mask in self.keep.values():
            mask.fill_(True)
        merging.set_masks(self.student, self.anatomy, self.keep)

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """The task's own loss."""
        out = self.task.forward(self.student, batch)
        loss = cross_entropy(out.logits, _base.labels_of(out))
        return _base.Losses(loss, out.logits.shape[0], {"ce": loss.detach()})

    @torch.no_grad()
    def inherited(self) -> dict[str, Tensor]:
        """Weights of the smaller model: those of this one, compactors multiplied in."""
        goal, anatomy = self.config, self.anatomy
        compactors = {name: p.detach().cpu() for name, p in merging.compactors_of(self.student, anatomy).items()}
        state = {name: value.cpu() for name, value in merging.inherited_state(self.student).items()}
        keep = {group: mask.cpu() for group, mask in self.keep.items()}
        kept_head = anatomy.head_size if goal.strategy == "head" else goal.hidden // anatomy.heads
        factor = merging.query_factor(anatomy.head_size, kept_head)
        return merging.merge(state, compactors, keep, anatomy, factor)

    def masked(self) -> nn.Module:
        """The model as it is merged: a copy in which all that is dropped is zero."""
        model: nn.Module = merging.zeroed(self.student, self.anatomy, self.keep).eval()
        return model


def _buffer(group: str) -> str:
    return f"keep_{group.replace('.', '_')}"
