"""A column store of examples, raw or encoded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np


class LazyColumn(Sequence[Any]):
    """A column whose values are made on indexing, such as decoded images."""

    def take(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The values at `indices`, in that order, without making any of them."""
        raise NotImplementedError


def _pick(column: Any, indices: np.ndarray) -> Any:
    if isinstance(column, np.ndarray):
        return column[indices]
    if isinstance(column, LazyColumn):
        return column.take(indices)
    return [column[i] for i in indices]


class Examples:
    """Rows held by column; indexing gives one row as a mapping.

    Args:
        columns: Column name to a sequence of equal lengths (list, array, or lazy sequence).
        lengths: Length of each row in tokens or samples, for bucketing; None when all are equal.
    """

    def __init__(self, columns: Mapping[str, Sequence[Any] | np.ndarray], lengths: np.ndarray | None = None) -> None:
        sizes = {len(column) for column in columns.values()}
        assert len(sizes) <= 1, f"columns of different lengths: {sizes}"
        self.columns = dict(columns)
        self.lengths = lengths
        self._size = sizes.pop() if sizes else 0

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}

    def select(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The rows at `indices`, in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        chosen = {name: _pick(column, rows) for name, column in self.columns.items()}
        lengths = None if self.lengths is None else self.lengths[rows]
        return type(self)(chosen, lengths)


@dataclass(slots=True)
class DataSplits:
    """Raw data of a run.

    Attributes:
        train: Rows to learn from; None where the source has only rows to score.
        validation: Rows for choices during training; None where there are none.
        test: Rows of the final proof, never used for choices.
        labels: Class names in id order; None for tasks without classes.
        roles: Role to source column, as chosen or guessed.
        provenance: Source, revision, rows of each split, sha256 of the files read.
    """

    train: Examples | None
    validation: Examples | None
    test: Examples
    labels: list[str] | None
    roles: dict[str, str]
    provenance: dict[str, Any] = field(default_factory=dict)
