"""What metrics of generated texts share: predictions beside references, means over texts, and libraries."""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdtool.errors import UsageProblem


@dataclass(frozen=True, slots=True)
class Texts:
    """What a model wrote, and what it should have.

    Attributes:
        predictions: One text for each row.
        references: As many.
        answers: How an answer is found in a text: `number`, `text`, or the name of a data set with rules of its own.
    """

    predictions: Sequence[str]
    references: Sequence[str]
    answers: str = "number"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over texts and its standard error; the error of a single text is not a number."""
    found = np.asarray(values, dtype=np.float64)
    error = found.std(ddof=1) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return float(found.mean()), float(error)


def library(module: str, metric: str) -> Any:
    """A library of the extra `eval`.

    Raises:
        UsageProblem: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageProblem(
            f"metric {metric} needs {module}", why=str(error), hint="pip install 'kdtool[eval]'"
        ) from None
