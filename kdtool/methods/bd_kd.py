"""Balanced divergences online: teacher and student train together, each sample weighted by who is surer (BD-KD).

With T the temperature, a_i = delta where the teacher's entropy exceeds the student's (the student is
over-confident), b_i = delta where the student's exceeds the teacher's, else 1:

    L_S = CE(z_s, y) + w T^2 mean_i [a_i KL(p^t_i || p^s_i) + b_i KL(p^s_i || p^t_i)]    (z_t constant)
    L_T = CE(z_t, y) + w T^2 mean_i KL(p^s_i || p^t_i)                                   (z_s constant)

Entropies are taken at temperature 1 and carry no gradient. The size of delta, T and w are this project's
choice: the paper's values could not be verified.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from kdtool.methods import _online
from kdtool.methods._online import kl, label_loss
from kdtool.methods._targets import precise


@dataclass(frozen=True, slots=True)
class Config(_online.OnlineConfig):
    """Weights of the two divergences."""

    delta: Annotated[float, Field(ge=1)] = 2.0
    """Weight of the divergence that a sample needs most; 1 weights both alike."""
    temperature: Annotated[float, Field(gt=0)] = 4.0
    """T of both divergences."""
    dead_zone: Annotated[float, Field(ge=0)] = 0.0
    """Entropies (nats) that differ by no more count as equal."""


class Objective(NamedTuple):
    """Both losses as sums over units, and what they were made of.

    Attributes:
        student: L_S times the number of units.
        teacher: L_T times the number of units.
        forward: [units] KL(p^t || p^s).
        reverse: [units] KL(p^s || p^t).
        weight_forward: [units] a_i.
        weight_reverse: [units] b_i.
        entropy_student: [units] nats.
        entropy_teacher: [units] nats.
    """

    student: Tensor
    teacher: Tensor
    forward: Tensor
    reverse: Tensor
    weight_forward: Tensor
    weight_reverse: Tensor
    entropy_student: Tensor
    entropy_teacher: Tensor


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, [units], detached."""
    log_p = torch.log_softmax(precise(logits.detach()), -1)
    return -(log_p.exp() * log_p).sum(-1)


def bd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    kd_weight: float = 1.0,
    delta: float = 2.0,
    temperature: float = 4.0,
    dead_zone: float = 0.0,
) -> Objective:
    """Both objectives from one pair of logits; no gradient crosses between the networks.

    Args:
        student: [units, classes]
        teacher: [units, classes]
        labels: [units]
        kd_weight: w.
        delta: Weight of the divergence that a sample needs most.
        temperature: T.
        dead_zone: Difference of entropies up to which both weights are 1.
    """
    h_s, h_t = entropy(student), entropy(teacher)
    a = 1.0 + (delta - 1.0) * (h_t - h_s > dead_zone)
    b = 1.0 + (delta - 1.0) * (h_s - h_t > dead_zone)
    scale = kd_weight * temperature**2
    forward = kl(teacher.detach(), student, temperature)
    reverse = kl(student, teacher.detach(), temperature)
    loss_s = label_loss(student, labels) + scale * (a * forward + b * reverse).sum()
    loss_t = label_loss(teacher, labels) + scale * kl(student.detach(), teacher, temperature).sum()
    return Objective(loss_s, loss_t, forward, reverse, a, b, h_s, h_t)


class Method(_online.OnlineMethod):
    """BD-KD with one teacher."""

    paper: ClassVar[str] = (
        "Amara et al., BD-KD: Balancing the Divergences for Online Knowledge Distillation, 2022, arXiv 2212.12965"
    )
    tasks: ClassVar[frozenset[str]] = frozenset(
        {"text-classification", "image-classification", "audio-classification", "tabular-classification"}
    )
    trains_teacher: ClassVar[bool] = True
    minimum: ClassVar[str] = "the cross-entropy of both networks pulls on weights that are equal"

    def losses(self, logits: list[Tensor], labels: Tensor, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Both objectives and the share of over-confident samples."""
        cfg = self.config
        found = bd_loss(logits[0], logits[1], labels, weight, cfg.delta, cfg.temperature, cfg.dead_zone)
        parts = {
            "student": found.student.detach(),
            "teacher": found.teacher.detach(),
            "forward kl": found.forward.detach().sum(),
            "reverse kl": found.reverse.detach().sum(),
            "over-confident": (found.entropy_teacher - found.entropy_student > cfg.dead_zone).sum().float(),
        }
        return found.student + found.teacher, parts

    def cautions(self, epochs: float) -> Sequence[str]:
        """Short runs and large weights collapse small students."""
        if self.config.delay == self.config.ramp == 0.0 and self.config.temperature <= 1.0 and self.config.delta > 2.0:
            return ("bd-kd with delta above 2 at temperature 1 can collapse small students: --set method.ramp=0.2",)
        return ()
