"""Matthews correlation: agreement of predictions and labels, 0 for chance, any number of classes."""

import numpy as np

from kdtool.metrics._calibration import single, tally

higher_is_better: bool = True
bounds: tuple[float, float | None] = (-1.0, 1.0)


def weighted(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The metric for each row of example weights, [r, n] -> [r]."""
    classes, predicted = logits.shape[1], logits.argmax(axis=1)
    total = weights.sum(axis=1)
    hits = weights @ (predicted == labels)
    truth, guess = tally(labels, weights, classes), tally(predicted, weights, classes)
    agreement = hits * total - (truth * guess).sum(axis=1)
    # Exact integers in float64 up to 9e15, so a constant prediction gives exactly zero here.
    scale = (total**2 - (guess**2).sum(axis=1)) * (total**2 - (truth**2).sum(axis=1))
    return np.asarray(np.divide(agreement, np.sqrt(scale), out=np.zeros_like(agreement), where=scale > 0))


def compute(logits: np.ndarray, labels: np.ndarray) -> float:
    """Correlation from -1 to 1; 0 where labels or predictions hold a single class.

    Args:
        logits: [n, classes].
        labels: [n] class ids.
    """
    return single(weighted, logits, labels)
