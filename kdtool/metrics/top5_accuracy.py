"""Top-5 accuracy: share of examples whose class is among the five highest scores."""

import numpy as np

from kdtool.metrics._calibration import mean, single

higher_is_better: bool = True
bounds: tuple[float, float | None] = (0.0, 1.0)


def weighted(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The metric for each row of example weights, [r, n] -> [r]."""
    own = logits[np.arange(len(labels)), labels][:, None]
    # Of equal scores the first class comes first, as in accuracy.
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    rank = (logits > own).sum(axis=1) + ((logits == own) & earlier).sum(axis=1)
    return mean((rank < 5).astype(np.float64), weights)


def compute(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of examples, 0 to 1; always 1 with five classes or fewer.

    Args:
        logits: [n, classes].
        labels: [n] class ids.
    """
    return single(weighted, logits, labels)
