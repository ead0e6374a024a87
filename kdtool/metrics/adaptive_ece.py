"""Adaptive calibration error: confidence against accuracy in 15 bins of equally many examples.

Edges are interpolated quantiles and bins hold (lower, upper], as in the published code: what shares
the very lowest confidence falls in no bin.
"""

from functools import partial

import numpy as np

from kdtool.metrics._calibration import confidence, equal_mass, gap, single

higher_is_better: bool = False
bounds: tuple[float, float | None] = (0.0, 1.0)


def weighted(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, bins: int = 15) -> np.ndarray:
    """The metric for each row of example weights, [r, n] -> [r]."""
    values, hits = confidence(logits, labels)
    found = []
    for row in weights:  # every resample has quantiles of its own
        edges = equal_mass(np.repeat(values, row.astype(np.int64)), bins)
        found.append(gap(values, hits, edges, row[None])[0])
    return np.array(found)


def compute(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Mean of |confidence - accuracy| over bins of equal mass, 0 to 1.

    Args:
        logits: [n, classes].
        labels: [n] class ids.
        bins: Number of bins.
    """
    return single(partial(weighted, bins=bins), logits, labels)
