"""What columns mean: roles as configured, or guessed from the usual names when there is no doubt."""

from collections.abc import Mapping, Sequence

import pyarrow as pa

from kdtool.errors import DataProblem, nearest
from kdtool.sections import DataSection

# A role of many columns, `features`, is filled in kdtool.data.table.
ROLES = ("text", "text_pair", "prompt", "input", "response", "messages", "label", "image", "audio")

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
    "prompt": ("prompt", "instruction", "question", "input"),
    "input": (),  # only beside an instruction, see _INSTRUCTIONS
    "response": ("response", "completion", "output", "answer", "target"),
    "messages": ("messages", "conversations", "conversation", "chat"),
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
_INSTRUCTIONS = (("instruction", "input"), ("instruction", "context"))
_CHAT_FIELDS = ({"role", "content"}, {"from", "value"})


def column_kinds(schema: pa.Schema) -> dict[str, str]:
    """Column name to what it can serve as: text, number, media, chat, empty, other."""
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
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type):
        fields = {field.name for field in kind.value_type}
        return "chat" if any(wanted <= fields for wanted in _CHAT_FIELDS) else "other"
    return "empty" if pa.types.is_null(kind) else "other"


def pick_layout(kinds: Mapping[str, str], config: DataSection, layouts: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Which of several sets of roles the data fills, for tasks that take more than one.

    Args:
        kinds: Columns of the data, as `column_kinds` gives them.
        config: Holds the columns that the user names; one of them decides.
        layouts: Sets of roles, the usual one first.

    Raises:
        DataProblem: columns of two sets are named, or the data fills two.
    """
    named = [layout for layout in layouts if any(getattr(config, role) is not None for role in layout)]
    if len(named) > 1:
        keys = [next(f"data.{role}" for role in layout if getattr(config, role) is not None) for layout in named]
        raise DataProblem(f"{' and '.join(keys)} are for different forms of data", hint="name columns of one form")
    if named or len(layouts) == 1:
        return (named or layouts)[0]
    found = {layout: [_usual(role, kinds) for role in layout] for layout in layouts[1:]}
    fitting = [layout for layout, columns in found.items() if all(columns)]
    taken = {name for layout in fitting for columns in found[layout] for name in columns}
    if not fitting or any(name not in taken for name in _usual(layouts[0][0], kinds)):
        fitting.insert(0, layouts[0])
    if len(fitting) > 1:
        first = fitting[-1][0]
        raise DataProblem(
            "the data could be read as " + " or as ".join(" and ".join(layout) for layout in fitting),
            why=_listed(kinds),
            hint=f"name a column: --set data.{first}={_usual(first, kinds)[0]}, or data.{fitting[0][0]}=COLUMN",
        )
    return fitting[0]


def _usual(role: str, kinds: Mapping[str, str]) -> list[str]:
    """Columns with one of a role's usual names that hold what it needs."""
    kind = "chat" if role == "messages" else "text"
    return [name for name in kinds if name.lower() in _NAMES[role] and kinds[name] == kind]


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
        roles |= _guess_pair(kinds, _PAIRS, ("text", "text_pair"))
    if "prompt" in wanted and "input" in wanted and "prompt" not in roles and "input" not in roles:
        roles |= _guess_pair(kinds, _INSTRUCTIONS, ("prompt", "input"))
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


def _guess_pair(kinds: Mapping[str, str], pairs: Sequence[tuple[str, str]], roles: tuple[str, str]) -> dict[str, str]:
    """Two roles by the usual names of both; nothing where there is doubt or a column has the first role's name."""
    lower = {name.lower(): name for name in kinds}
    found = [(lower[a], lower[b]) for a, b in pairs if a in lower and b in lower]
    if roles[0] in lower and roles[1] not in lower:
        return {}
    return dict(zip(roles, found[0], strict=True)) if len(found) == 1 else {}


def _candidates(role: str, kinds: Mapping[str, str], taken: set[str]) -> list[str]:
    """Columns that could fill a role: by usual name, else by a telling ending, else by being the only one."""
    free = [name for name in kinds if name not in taken]
    names = _NAMES.get(role, ())
    usual = [name for name in free if name.lower() in names]
    if role in ("prompt", "response", "messages"):
        usual = [name for name in _usual(role, kinds) if name in free]
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
    if role in ("image", "audio", "messages"):
        return [name for name in free if kinds[name] == ("chat" if role == "messages" else "media")]
    return []
