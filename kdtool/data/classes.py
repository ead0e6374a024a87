"""Labels of any form (ids, names, numbers written as text) into class ids, checked."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from kdtool.errors import DataProblem, nearest

_HIDDEN = "-1 marks hidden labels: choose a labelled split, such as --set data.test_split=validation"


def check_names(names: Sequence[str], origin: str) -> list[str]:
    """Class names, refused when one is there twice.

    Raises:
        DataProblem: a name is there twice, or there are none.
    """
    twice = sorted({name for name in names if list(names).count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise DataProblem(f"class '{twice[0]}' is there twice in {origin}")
    if not names:
        raise DataProblem(f"{origin} names no classes")
    return list(names)


def label_values(column: pa.ChunkedArray, name: str, split: str, untyped: bool) -> list[int] | list[str]:
    """Label values of one split: all ints, or all strings.

    Args:
        column: The column.
        name: Its name, for messages.
        split: Name of the split, for messages.
        untyped: Read text that holds whole numbers only as numbers (csv).

    Raises:
        DataProblem: labels are missing, or are neither names nor whole numbers.
    """
    values = column.to_pylist()
    missing = [row for row, value in enumerate(values) if value is None or value == "" or value != value]
    if missing:
        raise DataProblem(
            f"{len(missing)} of {len(values)} labels are missing in column '{name}' of split '{split}'"
            f" (first: row {missing[0] + 1})",
            hint="remove these rows, or choose another column: --set data.label=COLUMN",
        )
    if all(isinstance(value, str) for value in values):
        numbers = [_whole(value) for value in values] if untyped else [None]
        return values if None in numbers else [int(number) for number in numbers if number is not None]
    for row, value in enumerate(values):
        if not isinstance(value, int | float) or int(value) != value:
            raise DataProblem(
                f"column '{name}' holds no classes: {value!r:.40} in split '{split}', row {row + 1}",
                hint="a label is a class name or a whole number; choose another column: --set data.label=COLUMN",
            )
    return [int(value) for value in values]


def _whole(text: str) -> int | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def derive_names(values: Sequence[Any]) -> list[str]:
    """Class names from the labels of the training rows.

    Strings: the sorted distinct ones. Numbers: `0` to the largest; where 0 does not occur, the sorted
    distinct ones, since such data counts from elsewhere.

    Raises:
        DataProblem: numbers that cannot be class ids.
    """
    distinct = sorted(set(values))
    if isinstance(distinct[0], str):
        return distinct
    low, high = distinct[0], distinct[-1]
    if low < 0:
        raise DataProblem(f"label {low} is no class id", hint=_HIDDEN if low == -1 else "class ids start at 0")
    if low > 0:
        return [str(number) for number in distinct]
    if high > 10 * len(distinct) + 1000:
        raise DataProblem(
            f"labels look like measurements, not classes: {len(distinct)} different ones, up to {high}",
            hint="choose another column: --set data.label=COLUMN",
        )
    return [str(number) for number in range(high + 1)]


def class_ids(values: Sequence[Any], names: Sequence[str], split: str) -> np.ndarray:
    """Class id of each row; numbers are ids, unless all names are numbers, then they are names.

    Args:
        values: All ints, or all strings.
        names: Class names in id order.
        split: Name of the split, for messages.

    Returns:
        [rows] int64.

    Raises:
        DataProblem: an unknown name, or an id out of range, with its first row.
    """
    if isinstance(values[0], str) or all(name.isdecimal() for name in names):
        index = {name: position for position, name in enumerate(names)}
        texts = [str(value) for value in values]
        for row, text in enumerate(texts):
            if text not in index:
                hint = _HIDDEN if text == "-1" else nearest(text, names)
                raise DataProblem(
                    f"label '{text}' in split '{split}' (row {row + 1}) is none of the {len(names)} classes", hint=hint
                )
        return np.array([index[text] for text in texts], dtype=np.int64)
    ids = np.array(values, dtype=np.int64)
    wrong = np.flatnonzero((ids < 0) | (ids >= len(names)))
    if len(wrong):
        bad = int(ids[wrong[0]])
        raise DataProblem(
            f"label id {bad} in split '{split}' (row {wrong[0] + 1}) is out of range: there are {len(names)} classes",
            hint=_HIDDEN if bad == -1 else "name all classes in id order with data.labels, or correct the data",
        )
    return ids


def check_variety(ids: np.ndarray, names: Sequence[str]) -> None:
    """Refuse training rows of a single class.

    Raises:
        DataProblem: all rows have one class.
    """
    if len(np.unique(ids)) < 2:
        raise DataProblem(
            f"all {len(ids)} training rows have the class '{names[int(ids[0])]}'",
            hint="a classifier needs two classes or more; check data.label and data.limit",
        )
