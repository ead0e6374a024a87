"""AUROC: chance that an example of a class scores above one of the others, averaged over classes.

One class against the rest, exact: equal scores count half. Classes without examples on both sides
are left out; with none left the value is nan.
"""

import numpy as np

from kdtool.metrics._calibration import single, softmax

higher_is_better: bool = True
bounds: tuple[float, float | None] = (0.0, 1.0)


def _one_class(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area of one class against the rest for each weighting, [r]; nan where a side is empty."""
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.concatenate(([True], ranked[1:] != ranked[:-1])))
    above = np.add.reduceat((weights * positive)[:, order], starts, axis=1)  # [r, distinct scores]
    below = np.add.reduceat((weights * ~positive)[:, order], starts, axis=1)
    wins = (above * (np.cumsum(below, axis=1) - 0.5 * below)).sum(axis=1)
    pairs = above.sum(axis=1) * below.sum(axis=1)
    return np.asarray(np.divide(wins, pairs, out=np.full_like(wins, np.nan), where=pairs > 0))


def weighted(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The metric for each row of example weights, [r, n] -> [r]."""
    scores = softmax(logits)
    areas = np.stack([_one_class(scores[:, c], labels == c, weights) for c in np.unique(labels)])  # [classes, r]
    defined = ~np.isnan(areas)
    total, count = np.where(defined, areas, 0.0).sum(axis=0), defined.sum(axis=0)
    return np.asarray(np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0))


def compute(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean area over classes, 0 to 1; 0.5 is chance.

    Args:
        logits: [n, classes].
        labels: [n] class ids.
    """
    return single(weighted, logits, labels)
