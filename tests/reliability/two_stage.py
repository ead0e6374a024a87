"""A method of two stages with helpers of its own, for resuming in the middle of the second."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from kdtool.divergences import cross_entropy, forward_kl
from kdtool.methods import _base


@dataclass(frozen=True, slots=True)
class Config:
    """No settings."""


class Method(_base.Method):
    """First a temperature and a helper layer, then the student beside them."""

    paper: ClassVar[str] = "none"
    tasks: ClassVar[frozenset[str]] = frozenset({"text-classification"})

    def __init__(self, config, student, teachers, task):
        super().__init__(config, student, teachers, task)
        classes = student.model.config.num_labels
        self.helper = nn.Linear(classes, classes)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def stages(self) -> Sequence[_base.Stage]:
        return [
            _base.Stage("helper", 0.4, lambda name: name.startswith("helper")),
            _base.Stage("student", 0.6, lambda name: not name.startswith("helper.bias")),
        ]

    def step(self, batch, progress):
        self.seen += 1
        out, target = self.task.forward(self.student, batch), self.teach(batch)
        # a random draw in the step: the generators of a resumed run must stand where they stood
        noise = 1 + 0.1 * torch.rand(out.logits.shape)
        kd = forward_kl(self.helper(out.logits) * noise, target.logits, 2.0)
        ce = cross_entropy(out.logits, _base.labels_of(out))
        return _base.Losses(ce + kd, out.logits.shape[0], {"ce": ce.detach(), "kd": kd.detach()})
