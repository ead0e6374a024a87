"""How far a metric would move on other examples of the same kind: its standard error.

Rows are resampled with replacement. A metric that offers `weighted` gets all resamples of a chunk
at once as counts; one that offers only `compute` is called on the resampled rows.
"""

import math
from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np

_ENTRIES = 4_000_000
"""Most counts held at once; bounds memory, not the result."""


def accuracy_error(accuracy: float, count: int) -> float:
    """Standard error of a share: sqrt(p (1 - p) / n)."""
    return float(np.sqrt(accuracy * (1.0 - accuracy) / count))


def ratio_and_error(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Mean over units of independent rows, and its standard error to first order.

    Args:
        sums: [rows] sums over each row's units.
        counts: [rows] number of units.
    """
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return mean, math.nan
    apart = sums - mean * counts
    return mean, float(math.sqrt(len(sums) / (len(sums) - 1) * np.square(apart).sum()) / counts.sum())


def _draws(module: ModuleType, logits: np.ndarray, labels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The metric on each set of resampled row numbers, [r, n] -> [r]."""
    weighted = getattr(module, "weighted", None)
    if weighted is None:
        return np.array([module.compute(logits[rows], labels[rows]) for rows in chosen])
    counts = np.stack([np.bincount(rows, minlength=len(labels)) for rows in chosen]).astype(np.float64)
    return np.asarray(weighted(logits, labels, counts))


def bootstrap_errors(
    modules: Mapping[str, ModuleType],
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, float]:
    """Standard errors by resampling rows; every metric sees the same resamples.

    Args:
        modules: Metric name to the module that defines it.
        logits: [n, c].
        labels: [n] class ids.
        resamples: Number of resampled data sets.
        seed: Seed of the resampling.

    Returns:
        Name to standard error; metrics undefined on nearly all resamples are left out.
    """
    if not modules or len(labels) < 2:
        return {}
    generator = np.random.default_rng(seed)
    size = max(1, _ENTRIES // len(labels))
    draws: dict[str, list[np.ndarray]] = {name: [] for name in modules}
    for start in range(0, resamples, size):
        chosen = generator.integers(0, len(labels), (min(size, resamples - start), len(labels)))
        for name, module in modules.items():
            draws[name].append(_draws(module, logits, labels, chosen))
    return {name: spread for name, parts in draws.items() if (spread := _spread(parts)) is not None}


def _spread(parts: Sequence[np.ndarray]) -> float | None:
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    return float(values.std(ddof=1)) if len(values) > 1 else None
