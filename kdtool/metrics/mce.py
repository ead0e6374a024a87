"""Maximum calibration error: the largest distance of confidence from accuracy in any of 15 bins."""

from functools import partial

import numpy as np

from kdtool.metrics._calibration import confidence, equal_width, place, single

higher_is_better: bool = False
bounds: tuple[float, float | None] = (0.0, 1.0)


def weighted(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, bins: int = 15) -> np.ndarray:
    """The metric for each row of example weights, [r, n] -> [r]."""
    values, hits = confidence(logits, labels)
    members = place(values, equal_width(bins))
    off = np.abs(weights @ (members * (values - hits)[:, None]))
    mass = weights @ members
    return np.asarray(np.divide(off, mass, out=np.zeros_like(off), where=mass > 0).max(axis=1))


def compute(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Largest |confidence - accuracy| of a bin that is not empty, 0 to 1.

    Args:
        logits: [n, classes].
        labels: [n] class ids.
        bins: Number of bins.
    """
    return single(partial(weighted, bins=bins), logits, labels)
