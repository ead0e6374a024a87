"""Self-distillation with customised soft labels, without a teacher (USKD).

For logits z [units, classes], p = softmax(z), the label y with value v, and w the softmax of a weak
classifier on an intermediate feature (section 3.3 of the paper, in the form of its code):

    target    = - P * log p[y],  P = p[y]^2 + v - batch mean of p[y]^2,  detached
    weak      = - sum over j of t[j] * log w[j],  t = 0.9 * onehot + 0.1 / classes
    nontarget = - sum over j != y of zeta[j] * log p^[j],  p^ = softmax(z[not y]),  zeta detached
    loss      = ce_weight * CE + alpha * target + beta * nontarget + mu * weak

zeta ranks all classes by a score of w and p, gives rank 0, 1, 2 ... the value 1, 1/2, 1/3 ... (Zipf),
and is renormalised without the label. The weak classifier is one linear layer, dropped after
training. P couples the units of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from kdtool.data.examples import Examples
from kdtool.features import as_vector, stages_of
from kdtool.methods import _targets, _terms
from kdtool.models import Loaded
from kdtool.tasks._base import Batch, Task

_SMOOTHING, _EPS = 0.1, 1e-6


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the term of the label; 0.1 on CIFAR-100."""
    beta: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the term of the other classes."""
    mu: Annotated[float, Field(ge=0)] = 0.005
    """Weight of the weak classifier's cross-entropy, which also trains the layers below it; 0.1 on CIFAR-100."""
    mid_layer: str = "auto"
    """Feature of the weak classifier: the number of a stage or layer, a module path, or auto for the middle."""
    rank_score: Literal["log-probability", "probability"] = "log-probability"
    """What of p enters the score that ranks classes; the published code has the first, its text suggests the second."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Labels as the loss needs them: the one or two classes of each unit and their values.

    Attributes:
        classes: [units, k] class ids.
        values: [units, k], 0 where a unit has fewer than k classes.
        full: [units, classes] the labels as a distribution.
        mask: [units, classes] bool, true for classes with a value above 0.
    """

    classes: Tensor
    values: Tensor
    full: Tensor
    mask: Tensor

    @classmethod
    def of(cls, labels: Tensor, like: Tensor) -> "Targets":
        """From class ids [units] or soft labels [units, classes]; one-hot rows count as class ids."""
        if labels.ndim == 1:
            classes, values = labels[:, None], like.new_ones((len(labels), 1))
        else:
            values, classes = labels.to(like.dtype).topk(2, dim=-1)
        full = torch.zeros_like(like).scatter_(1, classes, values) if labels.ndim == 1 else labels.to(like.dtype)
        mask = torch.zeros_like(like).scatter_(1, classes, values) > 0
        return cls(classes, values, full, mask)


def soft_targets(p: Tensor, targets: Targets) -> Tensor:
    """P: p^2 of each unit's classes, shifted so that its batch mean is that of the values; [units, k], detached."""
    square = p.detach().gather(1, targets.classes).square()
    there = targets.values > 0
    mean = (square * there).sum(0) / there.sum(0).clamp_min(1)
    return (square + targets.values - mean).masked_fill(~there, 0.0)


def zipf(p: Tensor, w: Tensor, targets: Targets, rank_score: str = "log-probability") -> Tensor:
    """zeta: soft labels of the other classes by rank, [units, classes], 0 at the targets, rows sum to 1, detached.

    The targets take part in the ranking before they are left out, so their ranks stay empty.

    Args:
        p: Log-probabilities of the student [units, classes].
        w: Probabilities of the weak classifier [units, classes].
        targets: The labels.
        rank_score: `log-probability` or `probability`.
    """
    p, w = p.detach(), w.detach()
    score = p.exp() if rank_score == "probability" else p

    def among_the_rest(values: Tensor) -> Tensor:
        left = 1 - values.masked_fill(~targets.mask, 0.0).sum(-1, keepdim=True)
        return values / (left + _EPS)

    order = (among_the_rest(w) + among_the_rest(score)).argsort(dim=-1, descending=True, stable=True)
    values = 1 / torch.arange(1, p.shape[1] + 1, device=p.device, dtype=p.dtype)
    ranked = torch.empty_like(p).scatter_(1, order, values.expand_as(p))
    ranked = ranked.masked_fill(targets.mask, 0.0)
    return ranked / ranked.sum(-1, keepdim=True)


def uskd_terms(
    student: Tensor, weak: Tensor, labels: Tensor, rank_score: str = "log-probability"
) -> tuple[Tensor, Tensor, Tensor]:
    """Target, other-classes and weak term, each summed over units, not weighted.

    Args:
        student: Logits [units, classes]; at least one class more than a unit has targets.
        weak: Logits of the weak classifier [units, classes].
        labels: [units] class ids, or soft labels [units, classes], of which the two largest count.
        rank_score: See `Config`.

    Returns:
        Three scalars in float32, or float64 for float64 logits.
    """
    student, weak = _targets.precise(student), _targets.precise(weak)
    targets = Targets.of(labels, student)
    log_p, log_w = functional.log_softmax(student, -1), functional.log_softmax(weak, -1)
    target = -(soft_targets(log_p.exp(), targets) * log_p.gather(1, targets.classes)).sum()
    zeta = zipf(log_p, log_w.exp(), targets, rank_score)
    nontarget = -(zeta * _targets.log_softmax_without(student, targets.mask)).sum()
    smooth = (1 - _SMOOTHING) * targets.full + _SMOOTHING / student.shape[1]
    return target, nontarget, -(smooth * log_w).sum()


def middle(model: Any) -> str:
    """Path of the module whose output the paper feeds to the weak classifier.

    The last but one stage of a network with stages (before a stage's own downsampling, as in Swin),
    the layer at half depth of a network of equal layers.
    """
    paths = stages_of(model)
    settings = model.config
    staged = any(isinstance(getattr(settings, key, None), list | tuple) for key in ("depths", "hidden_sizes"))
    if not staged:
        return paths[max(0, len(paths) // 2 - 1)]
    path = paths[-2]
    blocks = getattr(model.get_submodule(path), "blocks", None)
    return f"{path}.blocks.{len(blocks) - 1}" if isinstance(blocks, nn.ModuleList) else path


class Method(_terms.TermMethod):
    """Self-distillation with customised soft labels, without a teacher (USKD)."""

    paper: ClassVar[str] = (
        "Yang et al.: From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized "
        "Loss and Customized Soft Labels, 2023, arXiv:2303.13005"
    )
    tasks: ClassVar[frozenset[str]] = frozenset(
        {"text-classification", "image-classification", "audio-classification", "tabular-classification"}
    )
    mixes: ClassVar[bool] = True
    teachers: ClassVar[tuple[int, int]] = (0, 0)
    reads_teacher: ClassVar[bool] = False
    batchwise: ClassVar[bool] = True

    def __init__(self, config: Config, student: Loaded, teachers: Sequence[Loaded], task: Task) -> None:
        super().__init__(config, student, teachers, task)
        self.tap = middle(student.model) if config.mid_layer == "auto" else config.mid_layer
        self.student_taps = (self.tap,)
        # text encoders sum up a text in their first token, as vision transformers do in their class token
        named = any(name.endswith("cls_token") for name, _ in student.model.named_parameters())
        self.first_token = named or task.name == "text-classification"

    def feature(self, value: Tensor) -> Tensor:
        """The tapped activation as one vector per example [units, width]: class token, or mean over positions."""
        return value[:, 0] if value.ndim == 3 and self.first_token else as_vector(value)

    def build(self, student: _terms.Side, teacher: _terms.Side | None, data: Examples) -> None:
        """The weak classifier."""
        width = self.feature(student.taps[self.tap]).shape[-1]
        self.weak = nn.Linear(width, student.logits.shape[-1], device=student.logits.device)

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """The term of the label, of the other classes, and of the weak classifier."""
        cfg: Config = self.config
        weak = self.weak(self.feature(student.taps[self.tap]).to(self.weak.weight.dtype))
        target, nontarget, supervision = uskd_terms(student.logits, weak, labels, cfg.rank_score)
        return [
            _terms.Term("target", cfg.alpha, target),
            _terms.Term("nontarget", cfg.beta, nontarget),
            _terms.Term("weak", cfg.mu, supervision),
        ]
