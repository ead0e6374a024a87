"""Agreement of the classes of data and model: same order, by name, or as the user maps them."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from kdtool.errors import DataProblem, nearest

_GENERIC = re.compile(r"label_\d+")
_BY_NAME = "--set data.label_map=by-name"


def _plain(name: str) -> str:
    """A class name without the differences that carry no meaning: case, spaces, underscores, dashes."""
    return re.sub(r"[\s_-]+", "", name).casefold()


def _unnamed(model_labels: Sequence[str]) -> bool:
    """Whether the model has only the names that transformers fills in, LABEL_0, LABEL_1, ..."""
    return all(_GENERIC.fullmatch(name.lower()) for name in model_labels)


def _index(names: Sequence[str], whose: str) -> dict[str, int]:
    """Simplified name to class id.

    Raises:
        DataProblem: two names differ only in case, spaces, underscores or dashes.
    """
    found: dict[str, int] = {}
    for position, name in enumerate(names):
        twin = found.setdefault(_plain(name), position)
        if twin != position:
            raise DataProblem(
                f"classes '{names[twin]}' and '{name}' of {whose} cannot be told apart by name",
                hint="map classes one by one: data.label_map: {DATA CLASS: MODEL CLASS} in a configuration file",
            )
    return found


def _by_name(data_labels: Sequence[str], model_labels: Sequence[str], what: str) -> np.ndarray:
    _index(data_labels, "the data")
    known = _index(model_labels, what)
    for name in data_labels:
        if _plain(name) not in known:
            raise DataProblem(
                f"class '{name}' of the data is unknown to {what}",
                hint=f"{nearest(name, model_labels)} Map it by data.label_map: {{{name}: MODEL CLASS}}",
            )
    return np.array([known[_plain(name)] for name in data_labels], dtype=np.int64)


def _by_dict(
    data_labels: Sequence[str], model_labels: Sequence[str], mapping: Mapping[str, str], what: str
) -> np.ndarray:
    for name, target in mapping.items():
        if name not in data_labels:
            raise DataProblem(
                f"data.label_map names '{name}', which is no class of the data", hint=nearest(name, data_labels)
            )
        if target not in model_labels:
            raise DataProblem(
                f"data.label_map sends '{name}' to '{target}', which is no class of {what}",
                hint=nearest(target, model_labels),
            )
    for name in data_labels:
        if name not in mapping:
            raise DataProblem(
                f"class '{name}' of the data is missing from data.label_map",
                hint=f"for the class of {what}: {nearest(name, model_labels)}",
            )
    return np.array([list(model_labels).index(mapping[name]) for name in data_labels], dtype=np.int64)


def match_labels(
    data_labels: list[str],
    model_labels: list[str] | None,
    label_map: Literal["refuse", "by-name"] | dict[str, str],
    what: str,
) -> np.ndarray:
    """For each class id of the data, the class id of the model.

    Ids are taken as they are when the model has no class names (None, or LABEL_0, LABEL_1, ...), when
    the data has only numbers for names, each with the same number of classes, and when both have the
    same names in the same order.

    Args:
        data_labels: Class names of the data in id order.
        model_labels: Class names of the model in id order; None when the model takes those of the data.
        label_map: What to do otherwise: `refuse`, `by-name` (case, spaces, underscores and dashes do not
            count), or an explicit mapping from data class to model class that names every data class.
        what: The model in messages, such as `the teacher`.

    Returns:
        [data classes] int64 class ids of the model.

    Raises:
        DataProblem: the classes differ and label_map does not settle how; names the first difference.
    """
    count = len(data_labels)
    identity = np.arange(count, dtype=np.int64)
    if isinstance(label_map, dict):
        return identity if model_labels is None else _by_dict(data_labels, model_labels, label_map, what)
    if model_labels is None or [_plain(n) for n in data_labels] == [_plain(n) for n in model_labels]:
        return identity
    numbered = data_labels == [str(i) for i in range(count)]
    if _unnamed(model_labels) or numbered:
        if count != len(model_labels):
            raise DataProblem(
                f"the data has {count} classes, {what} has {len(model_labels)}",
                why="one of them has no class names to match by",
                hint="choose another model, or name the classes of the data with data.labels",
            )
        return identity
    if label_map == "by-name":
        return _by_name(data_labels, model_labels, what)
    for position, (mine, theirs) in enumerate(zip(data_labels, model_labels, strict=False)):
        if _plain(mine) != _plain(theirs):
            difference = f"class {position} is '{mine}' in the data and '{theirs}' in {what}"
            break
    else:
        difference = f"the data has {count} classes, {what} has {len(model_labels)}"
    raise DataProblem(f"data and model disagree on classes: {difference}", hint=_BY_NAME)
