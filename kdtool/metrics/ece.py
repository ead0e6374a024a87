"""Expected calibration error: confidence against accuracy in 15 equally wide bins.

On few examples it is biased upwards (about a point at 1,000); compare equal numbers only.
"""

from functools import partial

import numpy as np

from kdtool.metrics._calibration import confidence, equal_width, gap, single

higher_is_better: bool = False
bounds: tuple[float, float | None] = (0.0, 1.0)


def weighted(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, bins: int = 15) -> np.ndarray:
    """The metric for each row of example weights, [r, n] -> [r]."""
    values, hits = confidence(logits, labels)
    return gap(values, hits, equal_width(bins), weights)


def compute(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Mean of |confidence - accuracy| over bins, by their share, 0 to 1.

    Args:
        logits: [n, classes].
        labels: [n] class ids.
        bins: Number of bins.
    """
    return single(partial(weighted, bins=bins), logits, labels)
