"""What columns mean: roles as configured, or guessed from the usual names when there is no doubt."""

from collections.abc import Mapping, Sequence

import pyarrow as pa

from kdtool.config import DataSection
from kdtool.errors import DataProblem, nearest

# A role of many columns, `features`, is filled in kdtool.data.table.
ROLES = ("text", "text_pair", "label", "image", "audio")

# The first name of each role wins when it is there; the others have to be alone.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "text": (
        "text",
        "sentence",
        "question",
        "utterance",
        "content",
        "review",
        "query",
        "tweet",
        "comment",
        "document",
        "story",
    ),
    "label": ("label", "labels", "target", "intent", "category", "digit", "class"),
    "image": ("image", "img", "images", "picture", "photo", "pixel_values"),
    "audio": ("audio", "speech", "recording", "wav"),
}
_PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("text_a", "text_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
)


def column_kinds(schema: pa.Schema) -> dict[str, str]:
    """Column name to what it can serve as: text, number, media, empty, other."""
    return {field.name: _kind(field.type) for field in schema}


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return "number"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "media"
    if pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}:
        return "media"
    return "empty" if pa.types.is_null(kind) else "other"


def resolve_roles(
    kinds: Mapping[str, str], config: DataSection, columns: Sequence[str], optional: Sequence[str]
) -> dict[str, str]:
    """Role to column, for all required roles and those optional ones that are found.

    Args:
        kinds: Columns of the data, as `column_kinds` gives them.
        config: Holds the columns that the user names.
        columns: Roles the task needs.
        optional: Roles the task can use.

    Raises:
        DataProblem: a column that is named does not exist, or a role cannot be guessed.
    """
    wanted = [role for role in ROLES if role in columns or role in optional]
    roles: dict[str, str] = {}
    for role in wanted:
        name = getattr(config, role)
        if name is not None:
            if name not in kinds:
                raise DataProblem(
                    f"the data has no column '{name}' (data.{role})", why=_listed(kinds), hint=nearest(name, kinds)
                )
            roles[role] = name
    if "text" in wanted and "text_pair" in wanted and "text" not in roles and "text_pair" not in roles:
        roles |= _guess_pair(kinds)
    for role in wanted:
        if role in roles:
            continue
        found = _candidates(role, kinds, set(roles.values()))
        if len(found) == 1:
            roles[role] = found[0]
        elif role in columns:
            what = (
                f"more than one column could be '{role}': {', '.join(found)}"
                if found
                else f"no column looks like '{role}'"
            )
            raise DataProblem(
                what, why=_listed(kinds), hint=f"name it: --set data.{role}={found[0] if found else 'COLUMN'}"
            )
    return {role: roles[role] for role in wanted if role in roles}


def _listed(kinds: Mapping[str, str]) -> str:
    return f"columns: {', '.join(kinds) or 'none'}"


def _guess_pair(kinds: Mapping[str, str]) -> dict[str, str]:
    lower = {name.lower(): name for name in kinds}
    found = [(lower[a], lower[b]) for a, b in _PAIRS if a in lower and b in lower]
    if "text" in lower and "text_pair" not in lower:
        return {}
    return {"text": found[0][0], "text_pair": found[0][1]} if len(found) == 1 else {}


def _candidates(role: str, kinds: Mapping[str, str], taken: set[str]) -> list[str]:
    """Columns that could fill a role: by usual name, else by a telling ending, else by being the only one."""
    free = [name for name in kinds if name not in taken]
    names = _NAMES.get(role, ())
    usual = [name for name in free if name.lower() in names]
    first = [name for name in usual if name.lower() == names[0]]
    if first:
        return first
    if usual:
        return usual
    if role == "label":
        return [
            name for name in free if name.lower().endswith(("_label", "_class")) and kinds[name] in ("number", "text")
        ]
    if role == "text":
        return [name for name in free if kinds[name] == "text" and name.lower() not in _NAMES["label"]]
    if role in ("image", "audio"):
        return [name for name in free if kinds[name] == "media"]
    return []
