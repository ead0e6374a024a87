"""Methods of language models that compare texts, whatever tokens each model cuts them into.

A group is the shortest stretch of text that is whole tokens in both tokenizers. Where both models have the same
tokens, every token is a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdtool.data.examples import Examples
from kdtool.errors import TrainingProblem
from kdtool.methods import _base
from kdtool.models import Loaded
from kdtool.tasks._base import LABELS, Batch, States, Task, view_of
from kdtool.tasks._language import IGNORED
from kdtool.tasks._spans import GROUPS


@dataclass(frozen=True, slots=True)
class Seen:
    """What both models say of a batch.

    Attributes:
        own: The student's states of its tokens that count.
        theirs: The teacher's of its own.
        places: [groups, 4] first unit of each group and the one behind its last, of the student and the teacher.
    """

    own: States
    theirs: States
    places: Tensor


class GroupMethod(_base.Method):
    """Base: both models on the same texts, each in its own tokens."""

    other_tokenizers: ClassVar[bool] = True
    """True if teacher and student may have different tokenizers."""
    cacheable: ClassVar[bool] = False
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    needs: ClassVar[str] = "next tokens to predict"

    def __init__(self, config: Any, student: Loaded, teachers: Sequence[Loaded], task: Task) -> None:
        super().__init__(config, student, teachers, task)

    @classmethod
    def chunk(cls, config: Any) -> int | None:
        """As many tokens as the device likes."""
        return 0

    def setup(self, batch: Batch, data: Examples) -> None:
        """Check that both models' heads give their logits.

        Raises:
            TrainingProblem: one does not, so the loss could not be made from hidden states.
        """
        for model in (self.student, self.teacher_list[0].model):
            if not self.task.has_states(model):
                raise TrainingProblem(
                    f"the logits of {type(model).__name__} are not those of its output embedding",
                    hint="use models whose head is a plain output embedding, and --set train.parallel=ddp",
                )

    def see(self, batch: Batch) -> Seen:
        """Run both models."""
        own = self.task.states(self.student, batch)
        other = view_of(batch, 0)
        with torch.no_grad():
            theirs = self.task.states(self.teacher_list[0].model, other)
        if GROUPS not in batch:
            units = torch.arange(len(own.hidden), device=own.hidden.device)
            return Seen(own, theirs, torch.stack([units, units + 1, units, units + 1], 1))
        rows, *tokens = batch[GROUPS].unbind(1)
        numbers = [_numbers(one) for one in (batch, other)]
        places = [numbers[i // 2][rows, tokens[i] - i % 2] + i % 2 for i in range(4)]
        return Seen(own, theirs, torch.stack(places, 1))


def _numbers(batch: Batch) -> Tensor:
    """Number of the unit that each token [rows, n] is; of no meaning where it does not count."""
    counts = batch[LABELS] != IGNORED
    counts[:, 0] = False
    return counts.flatten().cumsum(0).view_as(counts) - 1
