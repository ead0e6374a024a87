"""Rows of a table whose columns are features: which columns, and their values as numbers or names."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdtool.data.examples import LazyColumn
from kdtool.errors import DataProblem, nearest
from kdtool.sections import DataSection

FEATURES = "features"
"""Role of all columns that a model of tables sees."""


class FeatureRows(LazyColumn):
    """The feature columns of some rows; indexing gives one row as a mapping.

    Args:
        table: Their values.
        where: What the rows are, for messages.
        untyped: Whether numbers are written as text (csv).
    """

    def __init__(self, table: pa.Table, where: str, untyped: bool) -> None:
        self.table, self.where, self.untyped = table, where, untyped

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        return self.table.slice(int(index), 1).to_pylist()[0]

    def take(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The rows at `indices`, in that order."""
        return type(self)(self.table.take(pa.array(np.asarray(indices, dtype=np.int64))), self.where, self.untyped)

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return list(self.table.column_names)

    def is_numeric(self, name: str) -> bool:
        """Whether a column holds numbers by its type, or, where there are no types, in every row that has a value."""
        kind = self.table.schema.field(name).type
        if _is_number(kind):
            return True
        if not self.untyped:
            return False
        column = self.table.column(name)
        return column.null_count < len(column) and _parsed(column) is not None

    def counts_rows(self, name: str) -> bool:
        """Whether a column of whole numbers rises by one from row to row, or has another one in each row named id."""
        values = self.numbers(name)
        if len(values) < 3 or not (np.isfinite(values).all() and (values == np.floor(values)).all()):
            return False
        different = len(np.unique(values)) == len(values)
        return bool((np.diff(values) == 1).all()) or (different and name.lower() in ("id", "index", "row", "row_id"))

    def numbers(self, name: str) -> np.ndarray:
        """A column as numbers [rows] float64; missing and infinite ones are NaN.

        Raises:
            DataProblem: there is no such column, or it holds something else.
        """
        column = self._column(name)
        if _is_number(column.type):
            values = column.cast(pa.float64())
        else:
            parsed = _parsed(column) if _is_text(column.type) else None
            if parsed is None:
                raise DataProblem(
                    f"column '{name}' of {self.where} holds values that are no numbers",
                    why=f"such as {_first_word(column)}",
                    hint=f"its values are names: --set data.categorical=[{name}]",
                )
            values = parsed
        found: np.ndarray = values.to_numpy(zero_copy_only=False).astype(np.float64)
        found[~np.isfinite(found)] = np.nan
        return found

    def texts(self, name: str) -> list[str | None]:
        """A column as names; whole numbers are written without a point, missing values are None.

        Raises:
            DataProblem: there is no such column, or it holds lists or other things without a name.
        """
        column = self._column(name)
        if not (_is_text(column.type) or _is_number(column.type) or pa.types.is_null(column.type)):
            raise DataProblem(
                f"column '{name}' of {self.where} holds {column.type}, neither numbers nor text",
                hint=f"leave it out: --set data.ignore=[{name}]",
            )
        return [None if value is None else _name(value) for value in column.to_pylist()]

    def _column(self, name: str) -> pa.ChunkedArray:
        if name not in self.table.column_names:
            raise DataProblem(
                f"{self.where} has no column '{name}', which the model needs", hint=nearest(name, self.names)
            )
        return self.table.column(name)


def feature_names(kinds: Mapping[str, str], config: DataSection, label: str | None) -> list[str]:
    """Columns that are features: those asked for, or all but the label and those to be ignored.

    Args:
        kinds: Column name to kind, as `column_kinds` gives it.
        config: Says what was asked for.
        label: Column with the class.

    Raises:
        DataProblem: a column that is named does not exist, or nothing is left.
    """
    for key in ("features", "ignore", "numeric", "categorical"):
        for name in getattr(config, key) or ():
            if name not in kinds:
                raise DataProblem(f"the data has no column '{name}' (data.{key})", hint=nearest(name, kinds))
    chosen = config.features or [name for name, kind in kinds.items() if kind in ("text", "number", "empty")]
    if label is not None and label in (config.features or ()):
        raise DataProblem(f"column '{label}' is the label and cannot be a feature", hint="take it out of data.features")
    left = [name for name in chosen if name != label and name not in config.ignore]
    if not left:
        raise DataProblem("the data has no columns besides the label", hint="choose them: --set data.features=[...]")
    return left


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _parsed(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Texts as float64, None where some are no numbers; empty ones are missing."""
    text = pc.utf8_trim_whitespace(column.cast(pa.string()))
    try:
        return pc.if_else(pc.equal(text, ""), None, text).cast(pa.float64())
    except pa.ArrowInvalid:
        return None


def _first_word(column: pa.ChunkedArray) -> str:
    """The first value of a column that is no number."""
    for value in column.to_pylist():
        try:
            float(value)
        except (TypeError, ValueError):
            if value is not None:
                return f"{value!r:.40}"
    return "none"


def _name(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
