"""Splitting a distribution over classes into target and other classes."""

import torch
from torch import Tensor
from torch.nn import functional

from kdtool.divergences import precise as precise


def hard(labels: Tensor) -> Tensor:
    """Class ids [units] of hard labels [units], or of soft ones [units, classes] their most likely class."""
    return labels.argmax(-1) if labels.ndim > 1 else labels


def mask_of(logits: Tensor, labels: Tensor) -> Tensor:
    """[units, classes] bool, true at the class id of each unit."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], True)


def log_softmax_without(logits: Tensor, left_out: Tensor) -> Tensor:
    """Log-probabilities among the classes that are not left out, renormalised over them.

    Args:
        logits: [units, classes], already divided by a temperature.
        left_out: [units, classes] bool; at least one class of each row must stay.

    Returns:
        [units, classes]; 0, without gradient, where a class is left out, so that a product with a
        probability of 0 there is 0 and not 0 * -inf.
    """
    return functional.log_softmax(logits.masked_fill(left_out, -torch.inf), -1).masked_fill(left_out, 0.0)


def softmax_without(logits: Tensor, left_out: Tensor) -> Tensor:
    """Probabilities among the classes that are not left out: [units, classes], 0 where left out."""
    return logits.masked_fill(left_out, -torch.inf).softmax(-1)


def caution(method: str, weight: str, size: float, epochs: float) -> list[str]:
    """A warning where a large weight meets a schedule too short for it.

    The step that a tempered term takes grows with weight * T; above 10 for weight * T^2, short
    schedules end below plain cross-entropy.

    Args:
        method: Its name.
        weight: What is large, as users write it.
        size: Its value.
        epochs: Length of training.
    """
    if size <= 10 or epochs >= 20:
        return []
    return [
        f"{method}: {weight} = {size:g} is large for {epochs:.3g} epochs and may end below plain training: "
        "lower it below 10, or train for 20 epochs or more"
    ]
