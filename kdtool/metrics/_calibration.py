"""Softmax, bins and the temperature: what the metric files share.

Metrics are written once, as `weighted(logits, labels, weights)`, where each row of `weights` says
how often every example counts. All ones give the metric; resampled counts give its spread.

Shapes: n examples, c classes, r weightings, b bins.
"""

from collections.abc import Callable

import numpy as np

Weighted = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64, [n, c]; -inf logits (classes ruled out) stay -inf."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities in float64, [n, c]."""
    return np.asarray(np.exp(log_softmax(logits)))


def single(weighted: Weighted, logits: np.ndarray, labels: np.ndarray) -> float:
    """The metric itself: every example counts once."""
    return float(weighted(logits, labels, np.ones((1, len(labels))))[0])


def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means, [r], of one value per example, [n]."""
    return np.asarray(weights @ values / weights.sum(axis=1))


def tally(classes: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """Weight that falls on each class, [r, size], for class ids [n]."""
    return np.stack([np.bincount(classes, row, minlength=size) for row in weights])


def confidence(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest probability of each example, and whether that class is right (1.0 or 0.0); both [n]."""
    probabilities = softmax(logits)
    return probabilities.max(axis=1), (probabilities.argmax(axis=1) == labels).astype(np.float64)


def equal_width(bins: int) -> np.ndarray:
    """Edges of equally wide bins over 0 to 1, [bins + 1]."""
    return np.asarray(np.linspace(0.0, 1.0, bins + 1))


def equal_mass(values: np.ndarray, bins: int) -> np.ndarray:
    """Interpolated quantiles as bin edges, [bins + 1]: position k n / bins among the sorted values."""
    positions = np.arange(bins + 1) * len(values) / bins
    return np.asarray(np.interp(positions, np.arange(len(values)), np.sort(values)))


def place(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """One-hot bin membership, [n, b]; bins hold (lower, upper], what lies outside is in no bin."""
    index = np.searchsorted(edges, values, side="left") - 1
    return np.asarray(index[:, None] == np.arange(len(edges) - 1), dtype=np.float64)


def gap(values: np.ndarray, hits: np.ndarray, edges: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Calibration error, [r]: |confidence - accuracy| of each bin, averaged with the bins' shares."""
    per_bin = weights @ (place(values, edges) * (values - hits)[:, None])
    return np.asarray(np.abs(per_bin).sum(axis=1) / weights.sum(axis=1))


def reliability_bins(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> list[tuple[float, float, int]]:
    """What a reliability diagram shows.

    Args:
        logits: [n, c] of any scale.
        labels: [n] class ids.
        bins: Number of equally wide bins over 0 to 1.

    Returns:
        (mean confidence, accuracy, number of examples) of each bin, empty bins as (centre, nan, 0).
    """
    values, hits = confidence(logits, labels)
    edges = equal_width(bins)
    members = place(values, edges).astype(bool)
    found = []
    for position in range(bins):
        chosen = members[:, position]
        count = int(chosen.sum())
        if count:
            found.append((float(values[chosen].mean()), float(hits[chosen].mean()), count))
        else:
            found.append((float(edges[position : position + 2].mean()), float("nan"), 0))
    return found


def fit_temperature(
    logits: np.ndarray, labels: np.ndarray, *, lowest: float = 0.05, highest: float = 20.0, iterations: int = 100
) -> float:
    """The T that minimises the negative log-likelihood of softmax(logits / T).

    The loss is convex in 1/T: Newton's method on 1/T, with bisection on log T wherever a step leaves
    the bracket. Where the optimum lies outside the bounds (separable data, useless logits) the
    nearer bound is returned. Fit it on other examples than those it is judged on.

    Args:
        logits: [n, c].
        labels: [n] class ids.
        lowest: Smallest T considered.
        highest: Largest T considered.
        iterations: Most steps.
    """
    scores = logits.astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    # A class ruled out by -inf has probability 0 at every T; a finite stand-in avoids 0 * inf.
    scores[np.isneginf(scores)] = -1e9
    target = scores[np.arange(len(labels)), labels].mean()

    def slope(inverse: float) -> tuple[float, float]:
        """First and second derivative of the loss with respect to 1/T."""
        odds = np.exp(scores * inverse)
        odds /= odds.sum(axis=1, keepdims=True)
        first = (odds * scores).sum(axis=1)
        second = (odds * (scores - first[:, None]) ** 2).sum(axis=1)
        return float(first.mean() - target), float(second.mean())

    low, high = 1.0 / highest, 1.0 / lowest
    if slope(low)[0] >= 0.0:
        return highest
    if slope(high)[0] <= 0.0:
        return lowest
    inverse = min(max(1.0, low), high)
    for _ in range(iterations):
        first, second = slope(inverse)
        low, high = (inverse, high) if first < 0.0 else (low, inverse)
        step = inverse - first / second if second > 0.0 else high
        following = step if low < step < high else float(np.sqrt(low * high))
        if abs(following - inverse) <= 1e-12 * inverse:
            break
        inverse = following
    return 1.0 / inverse
