"""Negative log-likelihood: mean of -log p(right class), in nats."""

import numpy as np

from kdtool.metrics._calibration import log_softmax, mean, single

higher_is_better: bool = False
bounds: tuple[float, float | None] = (0.0, None)


def weighted(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The metric for each row of example weights, [r, n] -> [r]."""
    return mean(-log_softmax(logits)[np.arange(len(labels)), labels], weights)


def compute(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean in nats, 0 or more; infinite where a right class was ruled out.

    Args:
        logits: [n, classes].
        labels: [n] class ids.
    """
    return single(weighted, logits, labels)
