"""Metrics; one file is one metric, and says what it compares.

`logits` (the default): logits [n, classes] of a classifier and labels [n]. `texts`: what a language model wrote and
what it should have. `models`: the predictions of student and teacher.
"""

import importlib
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from kdtool.errors import DataProblem, TrainingProblem
from kdtool.metrics._calibration import fit_temperature, reliability_bins
from kdtool.metrics._standard_error import accuracy_error, bootstrap_errors, ratio_and_error
from kdtool.metrics._texts import Texts
from kdtool.registry import METRICS

__all__ = ["Texts", "compared", "fit_temperature", "ratio_and_error", "reliability_bins", "score", "score_texts"]


def compared(name: str) -> str:
    """What a metric compares: logits, texts or models; empty for those that a task computes itself."""
    plain = name.replace("_", "-")
    return str(METRICS.info(plain).facts.get("compares", "logits")) if plain in METRICS.names() else ""


def _modules(names: Iterable[str]) -> dict[str, Any]:
    """Name as given to the module of that metric."""
    found = {}
    for name in dict.fromkeys(names):
        compute = METRICS.get(name.replace("_", "-"))
        found[name] = sys.modules.get(compute.__module__) or importlib.import_module(compute.__module__)
    return found


def score_texts(names: Iterable[str], texts: Texts) -> tuple[dict[str, float], dict[str, float]]:
    """Compute metrics of generated texts and their standard errors.

    Args:
        names: Metrics that compare texts.
        texts: Predictions and references.

    Returns:
        Values and standard errors, keyed by the names as given.

    Raises:
        UsageProblem: an unknown metric, or a library is missing.
    """
    found = {name: module.measured(texts) for name, module in _modules(names).items()}
    return {name: pair[0] for name, pair in found.items()}, {name: pair[1] for name, pair in found.items()}


def _check(logits: np.ndarray, labels: np.ndarray) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise DataProblem(
            f"metrics need logits [n, classes] and labels [n], got {list(logits.shape)} and {list(labels.shape)}"
        )
    if not len(labels):
        raise DataProblem(
            "there is nothing to score", why="no rows are left", hint="check the test split and its limit"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise DataProblem(
            f"class {low if low < 0 else high} is in the data, but the model knows classes 0 to {logits.shape[1] - 1}",
            hint="map the data's classes to the model's by --set data.label_map=by-name",
        )
    if np.isnan(logits).any() or np.isposinf(logits).any() or np.isneginf(logits).all(axis=1).any():
        raise TrainingProblem(
            "the model's outputs are not finite, so nothing can be scored",
            why="training diverged, or the number format is too narrow",
            hint="lower --lr, or use --dtype float32",
        )


def score(
    names: Iterable[str], logits: np.ndarray, labels: np.ndarray, *, resamples: int = 200, seed: int = 0
) -> tuple[dict[str, float], dict[str, float]]:
    """Compute metrics and their standard errors.

    Args:
        names: Metric names; `macro_f1` and `macro-f1` are the same metric.
        logits: [n, classes] of any float type; -inf rules a class out.
        labels: [n] class ids.
        resamples: Bootstrap resamples; 0 leaves out all but the analytic error of accuracy.
        seed: Seed of the bootstrap.

    Returns:
        Values and standard errors, keyed by the names as given.

    Raises:
        UsageProblem: an unknown metric.
        DataProblem: no rows, wrong shapes, or classes the model does not have.
        TrainingProblem: logits that are not finite.
    """
    modules = _modules(names)
    _check(logits, labels)
    values = {name: float(module.compute(logits, labels)) for name, module in modules.items()}
    errors = {name: accuracy_error(value, len(labels)) for name, value in values.items() if name == "accuracy"}
    rest = {name: modules[name] for name, value in values.items() if name not in errors and np.isfinite(value)}
    if resamples > 1:
        errors |= bootstrap_errors(rest, logits, labels, resamples=resamples, seed=seed)
    return values, {name: errors[name] for name in values if name in errors}
