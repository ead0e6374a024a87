"""Collaborative learning: all networks learn from one target made of all their logits (KDCL).

L_k = CE_k + w T^2 KL(softmax(z* / T) || softmax(z_k / T)), z* constant, and one of

    naive      z* of a sample = the logits of the network with the smallest cross-entropy on it
    linear     z* = sum_k c_k z_k, c on the simplex with the least cross-entropy of the batch
    minlogit   z*_c = min_k (z_k,c - z_k,y)
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kdtool.methods import _online
from kdtool.methods._online import kl, label_loss
from kdtool.methods._targets import precise

_STEPS, _RATE = 20, 0.5


@dataclass(frozen=True, slots=True)
class Config(_online.OnlineConfig):
    """How the target is made."""

    target: Literal["naive", "linear", "minlogit"] = "minlogit"
    """How the logits of all networks become one target."""
    peers: Annotated[int, Field(ge=0)] = 1
    """Copies of the student with other random weights, where no teacher is given."""
    temperature: Annotated[float, Field(gt=0)] = 3.0
    """T of the divergence."""


@torch.no_grad()
def collective(logits: list[Tensor], labels: Tensor, how: str) -> Tensor:
    """The target logits z* [units, classes].

    Args:
        logits: [units, classes] of each network.
        labels: [units]
        how: naive, linear or minlogit.
    """
    stack = torch.stack([precise(z) for z in logits])  # [K, units, classes]
    if how == "minlogit":
        own = stack.gather(2, labels.expand(len(stack), -1).unsqueeze(-1))
        return (stack - own).amin(0)
    if how == "naive":
        wrong = torch.stack([functional.cross_entropy(z, labels, reduction="none") for z in stack])
        return stack.gather(0, wrong.argmin(0)[None, :, None].expand(1, -1, stack.shape[2]))[0]
    share = stack.new_full((len(stack),), 1.0 / len(stack))
    onehot = functional.one_hot(labels, stack.shape[2]).to(stack.dtype)
    for _ in range(_STEPS):  # projected gradient; the loss is convex in the shares
        p = torch.softmax(torch.einsum("k,kuc->uc", share, stack), -1)
        share = _simplex(share - _RATE * torch.einsum("uc,kuc->k", p - onehot, stack) / len(labels))
    return torch.einsum("k,kuc->uc", share, stack)


def _simplex(x: Tensor) -> Tensor:
    """Nearest point with entries >= 0 of sum 1."""
    ordered = x.sort(descending=True).values
    excess = (ordered.cumsum(0) - 1.0) / torch.arange(1, len(x) + 1, device=x.device)
    last = (ordered > excess).sum() - 1
    return (x - excess[last]).clamp_min(0.0)


class Method(_online.OnlineMethod):
    """KDCL; a given teacher is one of the networks."""

    paper: ClassVar[str] = "Guo et al., Online Knowledge Distillation via Collaborative Learning, CVPR 2020"
    tasks: ClassVar[frozenset[str]] = frozenset(
        {"text-classification", "image-classification", "audio-classification", "tabular-classification"}
    )
    teachers: ClassVar[tuple[int, int]] = (0, 1)
    trains_teacher: ClassVar[bool] = True
    batchwise: ClassVar[bool] = True
    golden: ClassVar[str] = "no reference code was run; tests/methods/test_online.py holds it to its equation"
    minimum: ClassVar[str] = "the cross-entropy of both networks pulls on weights that are equal"

    def copies(self) -> int:
        """At least one peer."""
        return 0 if self.given else max(1, int(self.config.peers))

    def losses(self, logits: list[Tensor], labels: Tensor, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Every network's loss against the one target."""
        temperature = self.config.temperature
        target = collective(logits, labels, self.config.target)
        found = [label_loss(z, labels) + weight * temperature**2 * kl(target, z, temperature).sum() for z in logits]
        parts = {"student": found[0].detach(), "peers": sum(found[2:], found[1]).detach()}
        return sum(found[1:], found[0]), parts
