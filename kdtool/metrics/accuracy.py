"""Accuracy: share of examples whose highest score is the right class."""

import numpy as np

from kdtool.metrics._calibration import mean, single

higher_is_better: bool = True
bounds: tuple[float, float | None] = (0.0, 1.0)


def weighted(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The metric for each row of example weights, [r, n] -> [r]."""
    return mean((logits.argmax(axis=1) == labels).astype(np.float64), weights)


def compute(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of right answers, 0 to 1; of equal scores the first class counts.

    Args:
        logits: [n, classes].
        labels: [n] class ids.
    """
    return single(weighted, logits, labels)
