"""Methods in which several networks train at the same time, each on what the others say.

All networks run once on a batch; the losses come from the same logits, with the other side detached, so
the update is simultaneous. The student alone is saved; a trained teacher too with `output.save_teacher`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from kdtool.methods import _base
from kdtool.methods._targets import precise
from kdtool.methods._terms import ramped
from kdtool.models import Loaded
from kdtool.tasks._base import Batch, Task, view_of


@dataclass(frozen=True, slots=True)
class OnlineConfig:
    """Settings that every online method has."""

    kd_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of what the networks learn from each other, beside the cross-entropy."""
    delay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of training before that sets in: early on the networks agree on nothing useful."""
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of training over which it then rises linearly."""
    random_teacher: bool = False
    """Start the teacher from random weights, as in the papers, instead of its own."""


class OnlineMethod(_base.Method):
    """Base: owns the student and its peers; the given teacher is a peer that trains."""

    reads_teacher: ClassVar[bool] = False
    trains_teacher: ClassVar[bool] = True
    """Read by the pipeline: the teacher may be untrained, and is measured after training."""

    def __init__(self, config: Any, student: Loaded, teachers: Sequence[Loaded], task: Task) -> None:
        super().__init__(config, student, teachers, task)
        peers: list[nn.Module] = []
        for teacher in self.teacher_list:
            if config.random_teacher:
                teacher.model = fresh(teacher.model)
            peers.append(teacher.model.requires_grad_(True).train())
        self.given = len(peers)
        peers += [fresh(self.student) for _ in range(self.copies())]
        self.peers = nn.ModuleList(peers)
        self.teacher_list = []  # nothing is frozen

    def copies(self) -> int:
        """Peers with the student's architecture, besides a given teacher."""
        return 0

    def losses(self, logits: list[Tensor], labels: Tensor, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over units of all networks' losses, and its named parts.

        Args:
            logits: [units, classes] of the student, then of each peer, with gradient.
            labels: [units]
            weight: Weight of the mutual terms at this point of training.
        """
        raise NotImplementedError

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """One pass of every network, one loss for all of them."""
        out = self.task.forward(self.student, batch)
        labels = _base.labels_of(out)
        views = [view_of(batch, i) if i < self.given else batch for i in range(len(self.peers))]
        logits = [out.logits]
        logits += [self.task.forward(peer, view).logits for peer, view in zip(self.peers, views, strict=True)]
        weight = self.config.kd_weight * ramped(progress, self.config.delay, self.config.ramp)
        total, parts = self.losses(logits, labels, weight)
        with torch.no_grad():
            parts["student accuracy"] = (out.logits.argmax(-1) == labels).sum().float()
        return _base.Losses(total, out.logits.shape[0], parts)


def fresh(model: Any) -> nn.Module:
    """A network of the same architecture with random weights."""
    made: nn.Module = type(model)(model.config)
    return made


def kl(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(target / T) || softmax(logits / T)) of each row, [units], without a factor T^2."""
    p = torch.log_softmax(precise(target) / temperature, -1)
    q = torch.log_softmax(precise(logits) / temperature, -1)
    return (p.exp() * (p - q)).sum(-1)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with class ids, summed over units, in float32, or float64 for float64 logits."""
    return functional.cross_entropy(precise(logits), labels, reduction="sum")
