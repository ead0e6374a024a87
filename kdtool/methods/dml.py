"""Deep mutual learning: networks that train together, each towards the mean of what the others say (DML).

L_k = CE_k + w / (K - 1) sum_{l != k} KL(p_l || p_k), the other networks' predictions constant, T = 1.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from kdtool.methods import _online
from kdtool.methods._online import kl, label_loss


@dataclass(frozen=True, slots=True)
class Config(_online.OnlineConfig):
    """How many networks."""

    peers: Annotated[int, Field(ge=0)] = 1
    """Copies of the student with other random weights that learn with it, where no teacher is given."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """T of the divergences, which are multiplied by T^2."""


def mutual_loss(logits: list[Tensor], labels: Tensor, weight: float, temperature: float = 1.0) -> list[Tensor]:
    """Loss of each network as a sum over units.

    Args:
        logits: [units, classes] of each network.
        labels: [units]
        weight: w.
        temperature: T.
    """
    found = []
    for k, own in enumerate(logits):
        others = [kl(z.detach(), own, temperature).sum() for j, z in enumerate(logits) if j != k]
        mean = sum(others[1:], others[0]) / len(others)
        found.append(label_loss(own, labels) + weight * temperature**2 * mean)
    return found


class Method(_online.OnlineMethod):
    """DML; a given teacher is the student's peer."""

    paper: ClassVar[str] = "Zhang et al., Deep Mutual Learning, CVPR 2018, arXiv 1706.00384"
    tasks: ClassVar[frozenset[str]] = frozenset(
        {"text-classification", "image-classification", "audio-classification", "tabular-classification"}
    )
    teachers: ClassVar[tuple[int, int]] = (0, 1)
    trains_teacher: ClassVar[bool] = True
    golden: ClassVar[str] = "no reference code was run; tests/methods/test_online.py holds it to its equation"
    minimum: ClassVar[str] = "the cross-entropy of both networks pulls on weights that are equal"

    def copies(self) -> int:
        """At least one peer."""
        return 0 if self.given else max(1, int(self.config.peers))

    def losses(self, logits: list[Tensor], labels: Tensor, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Every network's loss."""
        found = mutual_loss(logits, labels, weight, self.config.temperature)
        parts = {"student": found[0].detach(), "peers": sum(found[2:], found[1]).detach()}
        return sum(found[1:], found[0]), parts
