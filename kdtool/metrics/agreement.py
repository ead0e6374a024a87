"""Agreement with the teacher: share of examples, or of counted tokens, for which both rank the same class first."""

import numpy as np

from kdtool.metrics._standard_error import ratio_and_error

higher_is_better: bool = True
bounds: tuple[float, float | None] = (0.0, 1.0)
compares: str = "models"


def measured(student: np.ndarray, teacher: np.ndarray, units: np.ndarray) -> tuple[float, float]:
    """Share of units on which both agree, and its standard error with rows taken as independent.

    Args:
        student: [units] class or token ids, row by row.
        teacher: The same shape.
        units: [rows] number of units of each row.
    """
    same = np.add.reduceat(np.append(student == teacher, False).astype(np.float64), np.cumsum(units) - units)
    return ratio_and_error(np.where(units > 0, same, 0.0), units)


def compute(student: np.ndarray, teacher: np.ndarray) -> float:
    """Share of units on which both agree, 0 to 1."""
    return float(np.mean(student == teacher))
