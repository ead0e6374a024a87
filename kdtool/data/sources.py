"""From a reference to data (folder, file, shipped set, Hub id) to examples by role, checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kdtool.data.chats import conversations
from kdtool.data.classes import check_names, check_variety, class_ids, derive_names, label_values
from kdtool.data.columns import column_kinds, pick_layout, resolve_roles
from kdtool.data.examples import DataSplits, Examples
from kdtool.data.layout import SHIPPED, RawSplit, Source, open_disk, shipped_names
from kdtool.data.media import AudioColumn, ImageColumn
from kdtool.data.readers import table_suffix
from kdtool.data.splits import SplitPlan, choose, hold_out, plan_splits
from kdtool.data.table import FEATURES, FeatureRows, feature_names
from kdtool.errors import DataProblem, UsageProblem, nearest
from kdtool.run import Run
from kdtool.sections import DataSection


def load_data(
    config: DataSection,
    columns: tuple[str, ...],
    optional: tuple[str, ...],
    run: Run,
    *,
    others: tuple[tuple[str, ...], ...] = (),
    score_only: bool = False,
) -> DataSplits:
    """Read, check and split the data of a run.

    Columns of the examples are named by role: `text`, `text_pair`, `prompt`, `input` and `response` are lists
    of str, `messages` of lists of {role, content}, `label` is an int64 array of class ids, `image` and `audio`
    decode on indexing (a PIL image in RGB mode; a dict of `array`, float32 mono samples, and `sampling_rate` in
    Hz), `features` are `FeatureRows`.

    Args:
        config: Source, columns, splits and limits.
        columns: Roles the task needs, out of `kdtool.data.columns.ROLES` and features.
        optional: Roles the task can use; taken where every split has them.
        run: Gives seed, cache folder, offline mode, and the reporter that hears of guesses.
        others: Sets of roles that do instead of `columns`.
        score_only: Nothing will be trained: a source with a single split is scored in full instead of
            being cut into train and test.

    Raises:
        DataProblem: no such data, or data that cannot be used as asked.
        HubProblem: the Hub or the network refused.
        UsageProblem: an optional dependency is missing.
    """
    source = _open(config.source, run)
    plan = plan_splits(list(source.splits), config, score_only)
    raw = {name: _read(source, name) for name in plan.names}
    columns = pick_layout(_shared_kinds(raw), config, (columns, *others))
    roles = _roles(raw, config, columns, optional if "messages" not in columns else (), run)
    labels, ids = _labels(raw, roles, source, config, plan)
    features = _features(raw, config, roles) if FEATURES in columns else None
    tables = {name: _examples(split, roles, name, source.root, ids.get(name)) for name, split in raw.items()}
    for name, split in raw.items() if features else ():
        table = FeatureRows(split.table.select(features), f"split '{name}'", split.untyped)
        tables[name] = Examples({FEATURES: table, **tables[name].columns})
    train = tables[plan.train] if plan.train else None
    if plan.test:
        test = tables[plan.test]
    else:
        assert train is not None, "a plan without a test split has a train split"
        kept, held = hold_out(len(train), config.holdout, run.seed)
        run.reporter.info(f"test: {len(held)} rows held out of split '{plan.train}' (seed {run.seed})")
        train, test = train.select(kept), train.select(held)
    train = train if train is None else _limited(train, choose(len(train), config.limit, run.seed))
    test = _limited(test, choose(len(test), config.test_limit, run.seed, test=True))
    if train is not None and labels is not None and "label" in columns:
        check_variety(np.asarray(train.columns["label"]), labels)
    validation = tables[plan.validation] if plan.validation else None
    used = {"train": train, "validation": validation, "test": test}
    return DataSplits(train, validation, test, labels, roles, _provenance(source, plan, raw, used))


def _open(name: str | None, run: Run) -> Source:
    """Find what the source names: something on disk, then a shipped set, then the Hub."""
    if not name:
        raise UsageProblem(
            "no data given", hint="--data FOLDER, FILE, HUB_ID, or one of: " + ", ".join(shipped_names())
        )
    if Path(name).expanduser().exists():
        return open_disk(Path(name).expanduser(), name, "folder")
    place, sign, split = name.partition("#")
    if sign and Path(place).expanduser().exists():
        return _only(open_disk(Path(place).expanduser(), name, "folder"), split)
    if place in shipped_names():
        source = open_disk(SHIPPED / place, name, "shipped")
        return _only(source, split) if sign else source
    if _looks_local(place):
        raise DataProblem(f"data '{place}' does not exist", hint=_near_path(Path(place).expanduser()))
    from kdtool.data.hub_source import HubReference, open_hub

    reference = HubReference.parse(name)
    if reference is None:
        raise DataProblem(
            f"data '{name}' is neither a path nor a Hub id", hint="Hub ids: id[:config][@revision][#split]"
        )
    hint = None if "/" in reference.id else f"a shipped set? {nearest(reference.id, shipped_names())}"
    return open_hub(reference, name, run, hint)


def _looks_local(name: str) -> bool:
    path = Path(name).expanduser()
    obvious = name.startswith((".", "/", "~")) or name.split(":")[0].split("@")[0].count("/") > 1
    parent_exists = len(path.parts) > 1 and path.parent.is_dir()
    return obvious or parent_exists or table_suffix(name) is not None


def _near_path(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    return nearest(path.name, [entry.name for entry in parent.iterdir()])


def _only(source: Source, split: str) -> Source:
    """The source as if it had a single split."""
    if split not in source.splits:
        raise DataProblem(f"the data has no split '{split}'", hint=nearest(split, source.splits))
    splits = {split: source.splits[split]}
    return Source(source.name, source.form, splits, source.root, source.labels, source.revision)


def _read(source: Source, name: str) -> RawSplit:
    split = source.splits[name]()
    if split.table.num_rows == 0:
        raise DataProblem(f"split '{name}' of '{source.name}' holds no rows")
    return split


def _roles(
    raw: Mapping[str, RawSplit], config: DataSection, columns: tuple[str, ...], optional: tuple[str, ...], run: Run
) -> dict[str, str]:
    """Roles that hold for every split; guesses are said aloud."""
    roles = resolve_roles(_shared_kinds(raw), config, columns, optional)
    if any(getattr(config, role) is None for role in roles):
        run.reporter.info("columns: " + ", ".join(f"{role}={column}" for role, column in roles.items()))
    return roles


def _shared_kinds(raw: Mapping[str, RawSplit]) -> dict[str, str]:
    """Kinds of the columns that every split has."""
    kinds = [column_kinds(split.table.schema) for split in raw.values()]
    return {name: kind for name, kind in kinds[0].items() if all(name in other for other in kinds)}


def _features(raw: Mapping[str, RawSplit], config: DataSection, roles: Mapping[str, str]) -> list[str]:
    """Columns of the role of many columns."""
    return feature_names(_shared_kinds(raw), config, roles.get("label"))


def _labels(
    raw: Mapping[str, RawSplit], roles: Mapping[str, str], source: Source, config: DataSection, plan: SplitPlan
) -> tuple[list[str] | None, dict[str, np.ndarray]]:
    """Class names, and the class id of each row of each split."""
    column = roles.get("label")
    if column is None:
        return None, {}
    values = {
        name: label_values(split.table.column(column), column, name, split.untyped) for name, split in raw.items()
    }
    first = plan.train or plan.names[0]
    declared = raw[first].class_names.get(column)
    if config.labels is not None:
        names = check_names(config.labels, "data.labels")
    elif source.labels is not None:
        names = check_names(source.labels, "labels.json")
    elif declared:
        names = check_names(declared, f"the description of column '{column}'")
    else:
        names = derive_names(values[first])
    return names, {name: class_ids(found, names, name) for name, found in values.items()}


def _examples(
    split: RawSplit, roles: Mapping[str, str], name: str, root: Path | None, ids: np.ndarray | None
) -> Examples:
    columns: dict[str, Any] = {}
    for role, column in roles.items():
        where = f"column '{column}' of split '{name}'"
        if role == "label":
            assert ids is not None, "a label role has ids"
            columns[role] = ids
        elif role in ("image", "audio"):
            columns[role] = _media(split.table.column(column), role, where, root)
        elif role == "messages":
            columns[role] = conversations(split.table.column(column).to_pylist(), where)
        else:
            columns[role] = _texts(split.table.column(column), where, role)
    return Examples(columns)


def _texts(column: pa.ChunkedArray, where: str, role: str) -> list[str]:
    values: list[Any] = column.to_pylist()
    if role == "input":  # an instruction may need none
        values = ["" if value is None else value for value in values]
    missing = [row for row, value in enumerate(values) if value is None]
    if missing:
        raise DataProblem(
            f"{len(missing)} of {len(values)} texts are missing in {where} (first: row {missing[0] + 1})",
            hint=f"remove these rows, or choose another column: --set data.{role}=COLUMN",
        )
    if not isinstance(values[0], str):
        raise DataProblem(
            f"{where} holds {column.type}, not text", hint=f"choose another column: --set data.{role}=COLUMN"
        )
    return values


def _media(column: pa.ChunkedArray, role: str, where: str, root: Path | None) -> ImageColumn | AudioColumn:
    """A lazy column whose first row has been decoded once, so that what is wrong is said before work starts."""
    kind = column_kinds(pa.schema([("value", column.type)]))["value"]
    if kind not in ("media", "text"):
        raise DataProblem(f"{where} holds {column.type}, no {role}s", hint=f"choose another: --set data.{role}=COLUMN")
    media = (ImageColumn if role == "image" else AudioColumn)(column, where, root)
    media[0]
    return media


def _limited(examples: Examples, rows: np.ndarray | None) -> Examples:
    return examples if rows is None else examples.select(rows)


def _provenance(
    source: Source, plan: SplitPlan, raw: Mapping[str, RawSplit], used: Mapping[str, Examples | None]
) -> dict[str, Any]:
    """What was used, without machine paths: ends up in the manifest."""
    taken = {"train": plan.train, "validation": plan.validation, "test": plan.test or plan.train}
    splits: dict[str, Any] = {}
    for purpose, examples in used.items():
        name = taken[purpose]
        if examples is not None and name is not None:
            splits[purpose] = {
                "split": name,
                "rows": len(examples),
                "rows_read": raw[name].table.num_rows,
                "sha256": dict(raw[name].sha256),
            }
    return {"source": source.name, "form": source.form, "revision": source.revision, "splits": splits}
