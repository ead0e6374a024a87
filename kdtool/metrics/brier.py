"""Brier score: squared distance of the probabilities from the truth, summed over classes."""

import numpy as np

from kdtool.metrics._calibration import mean, single, softmax

higher_is_better: bool = False
bounds: tuple[float, float | None] = (0.0, 2.0)


def weighted(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The metric for each row of example weights, [r, n] -> [r]."""
    error = softmax(logits)
    error[np.arange(len(labels)), labels] -= 1.0
    return mean((error**2).sum(axis=1), weights)


def compute(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over examples of the sum over classes, 0 to 2.

    Args:
        logits: [n, classes].
        labels: [n] class ids.
    """
    return single(weighted, logits, labels)
