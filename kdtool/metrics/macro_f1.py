"""Macro F1: F1 of each class, averaged, so that rare classes count as much as common ones.

The mean runs over the classes that occur in the labels or the predictions; a class never hit has 0.
"""

import numpy as np

from kdtool.metrics._calibration import single, tally

higher_is_better: bool = True
bounds: tuple[float, float | None] = (0.0, 1.0)


def weighted(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The metric for each row of example weights, [r, n] -> [r]."""
    classes, predicted = logits.shape[1], logits.argmax(axis=1)
    hits = tally(labels, weights * (predicted == labels), classes)
    either = tally(labels, weights, classes) + tally(predicted, weights, classes)
    f1 = np.divide(2.0 * hits, either, out=np.zeros_like(hits), where=either > 0)
    return np.asarray(f1.sum(axis=1) / (either > 0).sum(axis=1))


def compute(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean F1 over classes, 0 to 1.

    Args:
        logits: [n, classes].
        labels: [n] class ids.
    """
    return single(weighted, logits, labels)
