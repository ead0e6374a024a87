"""Distillation without a teacher: from an ideal teacher made up, or from the student's first life (Tf-KD).

    loss = ce_weight * CE + kd_weight * T^2 * KL(p^d_T || p_T),  p_T = softmax(z / T)

virtual: p^d is `correct` at the label and even elsewhere, softened by T like any teacher
         (equation 9 of the paper).
self:    the student first trains on the labels alone; what it then says is p^d, and it starts
         again from its first weights (equation 8).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdtool.data.examples import Examples
from kdtool.divergences import forward_kl
from kdtool.methods import _base, _targets, _terms
from kdtool.models import Loaded
from kdtool.tasks._base import Batch, Task

_FIRST, _SECOND = "alone", "again"


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    variant: Literal["virtual", "self"] = "virtual"
    """Where the soft labels come from: made up from the label, or from the student trained once before."""
    temperature: Annotated[float, Field(gt=0)] = 20.0
    """T, softens both distributions."""
    correct: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Probability that the virtual teacher gives the label."""
    ce_weight: Annotated[float, Field(ge=0)] = 0.9
    """Weight of the cross-entropy with the labels."""
    kd_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the divergence from the soft labels."""
    first_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of training that the student of `self` spends alone, before it starts again."""


def virtual_logits(labels: Tensor, classes: int, correct: float = 0.99) -> Tensor:
    """Logarithm of the virtual teacher's distribution, which softens like logits: [units, classes] float32.

    Args:
        labels: [units] class ids.
        classes: Number of classes, at least 2.
        correct: Probability of the label.
    """
    log_p = torch.tensor([(1 - correct) / (classes - 1), correct], device=labels.device).log()
    ids = torch.arange(classes, device=labels.device)
    return log_p[(labels[:, None] == ids).long()]


def virtual_loss(student: Tensor, labels: Tensor, temperature: float = 20.0, correct: float = 0.99) -> Tensor:
    """T^2 * KL of the virtual teacher and the student, summed over units.

    Args:
        student: Logits [units, classes].
        labels: [units] class ids, or soft labels [units, classes], of which the largest counts.
        temperature: T > 0.
        correct: Probability of the label; at T = 1, 1 - e + e / classes gives labels smoothed by e.
    """
    return forward_kl(student, virtual_logits(_targets.hard(labels), student.shape[-1], correct), temperature)


class Method(_terms.TermMethod):
    """Distillation without a teacher: from an ideal teacher made up, or from the student's first life (Tf-KD)."""

    paper: ClassVar[str] = (
        "Yuan et al.: Revisiting Knowledge Distillation via Label Smoothing Regularization, 2020, arXiv:1909.11723"
    )
    tasks: ClassVar[frozenset[str]] = frozenset(
        {
            "text-classification",
            "image-classification",
            "audio-classification",
            "tabular-classification",
            "causal-lm",
            "seq2seq-lm",
            "masked-lm",
        }
    )
    mixes: ClassVar[bool] = True
    teachers: ClassVar[tuple[int, int]] = (0, 1)
    reads_teacher: ClassVar[bool] = False
    combinable: ClassVar[bool] = False
    golden: ClassVar[str] = "no reference values exist: checked against its formula in tests/methods/test_tf_kd.py"

    def __init__(self, config: Config, student: Loaded, teachers: Sequence[Loaded], task: Task) -> None:
        super().__init__(config, student, teachers, task)
        # with `self`: the student's first weights while it trains alone, its first life afterwards
        self.first: nn.Module | None = None
        self.alone = False

    def build(self, student: _terms.Side, teacher: _terms.Side | None, data: Examples) -> None:
        """Keep the student's first weights, to start again from; in the checkpoint, never in what is saved."""
        if self.config.variant == "self":
            self.first = copy.deepcopy(self.student).eval().requires_grad_(False)
            self.alone = True

    def train(self, mode: bool = True) -> "Method":
        """As for any module; the first life stays in eval mode."""
        super().train(mode)
        if self.first is not None:
            self.first.eval()
        return self

    def stages(self) -> Sequence[_base.Stage]:
        """With `self`, a life on the labels and one with the soft labels."""
        if self.config.variant == "virtual":
            return (_base.Stage(),)
        share = self.config.first_share

        def own(name: str) -> bool:
            return not name.startswith("first.")

        return (_base.Stage(_FIRST, share, own), _base.Stage(_SECOND, 1 - share, own))

    def enter(self, stage: str, resumed: bool) -> None:
        """Between its lives the student changes places with its first weights."""
        self.alone = stage == _FIRST
        if stage != _SECOND or resumed:
            return
        assert self.first is not None
        with torch.no_grad():
            pairs = zip(_tensors(self.student), _tensors(self.first), strict=True)
            for now, before in pairs:
                kept = now.clone()
                now.copy_(before)
                before.copy_(kept)

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The divergence from the soft labels."""
        cfg: Config = self.config
        if self.alone:
            return []
        if self.first is None:
            value = virtual_loss(student.logits, labels, cfg.temperature, cfg.correct)
        else:
            with torch.no_grad():
                soft = self.task.forward(self.first, batch).logits
            value = forward_kl(student.logits, soft, cfg.temperature)
        return [_terms.Term("kd", cfg.kd_weight, value)]


def _tensors(module: Any) -> list[Tensor]:
    """Parameters and buffers that a checkpoint holds, each once, in a fixed order."""
    found = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}
    return list(found.values())
