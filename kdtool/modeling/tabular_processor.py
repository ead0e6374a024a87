"""From the columns of a table to the inputs of a model of tables, with all that was learnt from training rows.

Numbers are standardised; a column with values far out is first compressed by sign(x) log(1 + |x|). A
missing number becomes 0, the mean, and columns that had gaps in training get a second input that is 1
where the value is missing. Names get ids from a vocabulary; what training hardly saw is unknown.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature, FeatureExtractionMixin

_FAR = 20.0
"""Standard deviations from the mean beyond which a column is compressed."""

_LARGEST = 1000
"""Names a vocabulary holds at most, the most frequent ones."""

UNKNOWN, MISSING = 0, 1
"""Ids, within each column, of names that training hardly saw and of missing ones."""


class TabularProcessor(FeatureExtractionMixin):
    """Turns rows into `numeric` and `categories`; saved beside the model as preprocessor_config.json.

    Args:
        numeric: For each column of numbers: `name`, `mean`, `std`, `log` (compressed first), `gaps`
            (an input says where it is missing).
        categorical: For each column of names: `name` and `values`, its vocabulary from id 2 on.
    """

    model_input_names = ["numeric", "categories"]

    def __init__(
        self, numeric: Sequence[Mapping[str, Any]] = (), categorical: Sequence[Mapping[str, Any]] = (), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.numeric = [dict(column) for column in numeric]
        self.categorical = [dict(column) for column in categorical]

    @classmethod
    def fit(
        cls, numeric: Mapping[str, np.ndarray], categorical: Mapping[str, Sequence[str | None]]
    ) -> "TabularProcessor":
        """Learn means, deviations and vocabularies from training rows.

        Args:
            numeric: Column name to values [rows] float64, NaN where missing.
            categorical: Column name to values [rows], None where missing.
        """
        return cls(
            [_measured(name, values) for name, values in numeric.items()],
            [{"name": name, "values": _vocabulary(values)} for name, values in categorical.items()],
        )

    @property
    def sizes(self) -> dict[str, int]:
        """What a model's configuration must say: `num_numeric`, `num_columns` and `num_categories`."""
        return {
            "num_numeric": len(self.numeric) + sum(bool(column["gaps"]) for column in self.numeric),
            "num_columns": len(self.categorical),
            "num_categories": sum(len(column["values"]) + 2 for column in self.categorical),
        }

    def encode(
        self, numeric: Mapping[str, np.ndarray], categorical: Mapping[str, Sequence[str | None]]
    ) -> dict[str, np.ndarray]:
        """Model inputs of columns that are numbers and names already, in the forms that `fit` takes.

        Returns:
            `numeric` [rows, num_numeric] float32 and `categories` [rows, num_columns] int64, each only
            where there are such columns. The ids of one column follow those of the column before it.
        """
        made: dict[str, np.ndarray] = {}
        if self.numeric:
            values = [_standardised(column, numeric[column["name"]]) for column in self.numeric]
            gaps = [np.isnan(numeric[column["name"]]) for column in self.numeric if column["gaps"]]
            made["numeric"] = np.stack([*values, *gaps], 1).astype(np.float32)
        ids, start = [], 0
        for column in self.categorical:
            known = {value: start + 2 + i for i, value in enumerate(column["values"])} | {None: start + MISSING}
            ids.append(np.array([known.get(value, start + UNKNOWN) for value in categorical[column["name"]]], np.int64))
            start += len(column["values"]) + 2
        if ids:
            made["categories"] = np.stack(ids, 1)
        return made

    def __call__(self, rows: Sequence[Mapping[str, Any]], return_tensors: str | None = None, **_: Any) -> BatchFeature:
        """Model inputs of rows given as mappings; what a row lacks is missing.

        Args:
            rows: One mapping from column name to value for each row.
            return_tensors: `pt` for torch, `np` or None for arrays.
        """
        numbers = {
            name: np.array([_number(row.get(name)) for row in rows])
            for name in (column["name"] for column in self.numeric)
        }
        names = {
            name: [None if row.get(name) in (None, "") else str(row[name]) for row in rows]
            for name in (column["name"] for column in self.categorical)
        }
        return BatchFeature(self.encode(numbers, names), tensor_type=return_tensors)


def _number(value: Any) -> float:
    found = float("nan") if value in (None, "") else float(value)
    return found if np.isfinite(found) else float("nan")


def _compressed(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.sign(values) * np.log1p(np.abs(values)))


def _measured(name: str, values: np.ndarray) -> dict[str, Any]:
    """Mean and deviation of the values that are there."""
    there = values[~np.isnan(values)]
    there = there if len(there) else np.zeros(1)
    mean, std = there.mean(), there.std()
    log = bool(std > 0 and np.abs((there - mean) / std).max() > _FAR)
    if log:
        mean, std = _compressed(there).mean(), _compressed(there).std()
    return {
        "name": name,
        "mean": float(mean),
        "std": float(std) if std > 1e-12 * max(1.0, abs(mean)) else 1.0,  # a constant column becomes 0
        "log": log,
        "gaps": bool(len(there) < len(values)),
    }


def _standardised(column: Mapping[str, Any], values: np.ndarray) -> np.ndarray:
    scaled = _compressed(values) if column["log"] else values
    filled: np.ndarray = np.nan_to_num((scaled - column["mean"]) / column["std"], nan=0.0)
    return filled


def _vocabulary(values: Sequence[str | None]) -> list[str]:
    """Names that occur twice or more, the most frequent first: from single ones the model learns what unknown is."""
    counts: dict[str, int] = {}
    for value in values:
        if value is not None:
            counts[value] = counts.get(value, 0) + 1
    often = [name for name in counts if counts[name] > 1]
    return sorted(often, key=lambda name: (-counts[name], name))[:_LARGEST]
