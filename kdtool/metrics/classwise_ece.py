"""Classwise calibration error: the probability of each class against how often it is right.

The mean runs over classes 0 to the highest label present, as in the published code.
"""

from functools import partial

import numpy as np

from kdtool.metrics._calibration import equal_width, gap, single, softmax

higher_is_better: bool = False
bounds: tuple[float, float | None] = (0.0, 1.0)


def weighted(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, bins: int = 15) -> np.ndarray:
    """The metric for each row of example weights, [r, n] -> [r]."""
    probabilities, edges = softmax(logits), equal_width(bins)
    classes = range(int(labels.max()) + 1)
    gaps = [gap(probabilities[:, c], (labels == c).astype(np.float64), edges, weights) for c in classes]
    return np.asarray(np.mean(gaps, axis=0))


def compute(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Mean over classes of the calibration error of their probability, 0 to 1.

    Args:
        logits: [n, classes].
        labels: [n] class ids.
        bins: Number of bins.
    """
    return single(partial(weighted, bins=bins), logits, labels)
