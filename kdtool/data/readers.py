"""One table file into one Arrow table; what is broken is said with file and line."""

import contextlib
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from kdtool.errors import DataProblem

TABLE_SUFFIXES = (".jsonl.gz", ".jsonl", ".json.gz", ".json", ".csv.gz", ".csv", ".tsv.gz", ".tsv", ".parquet")
_BLOCK = 64 << 20  # bytes; a row may not be longer
_BROKEN = (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError)


def table_suffix(name: str) -> str | None:
    """The ending that says how a file is read, such as `.jsonl.gz`; None for other files."""
    return next((suffix for suffix in TABLE_SUFFIXES if name.lower().endswith(suffix)), None)


def is_untyped(path: Path) -> bool:
    """Whether the format has no types, so that `1` may be a number or a name (csv, tsv)."""
    return (table_suffix(path.name) or "").startswith((".csv", ".tsv"))


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_table(path: Path) -> pa.Table:
    """Read a table file; csv and tsv columns stay text, an empty unquoted field is missing.

    Raises:
        DataProblem: the file is empty, corrupt, or not what its name says.
    """
    suffix = table_suffix(path.name) or ""
    try:
        if path.stat().st_size == 0:
            raise DataProblem(f"{path} is empty")
        if suffix.startswith(".parquet"):
            table = pa.parquet.ParquetFile(path, memory_map=True).read()
        elif suffix.startswith(".json"):
            table = _read_json(path)
        else:
            table = _read_csv(path, "\t" if suffix.startswith(".tsv") else ",")
    except _BROKEN as error:
        kind = suffix.lstrip(".").partition(".")[0]
        raise DataProblem(f"{path} cannot be read as {kind}", why=_one_line(error), hint=_hint(error)) from None
    repeated = {name for name in table.column_names if table.column_names.count(name) > 1}
    if repeated:
        raise DataProblem(f"{path} has more than one column '{min(repeated)}'")
    if table.num_rows == 0:
        raise DataProblem(f"{path} holds no rows")
    return table


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _hint(error: BaseException) -> str:
    if isinstance(error, PermissionError):
        return "check the permissions of the file"
    return "the file may be damaged, cut off, or of another format than its name says"


def _read_csv(path: Path, delimiter: str) -> pa.Table:
    """Read with every column as text: which columns hold numbers is decided by their use."""
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with pa.input_stream(str(path)) as stream:
        header = pa.csv.open_csv(
            stream, parse_options=parse, read_options=pa.csv.ReadOptions(block_size=1 << 20)
        ).schema
    text_only = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(header.names, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    with pa.input_stream(str(path)) as stream:
        options = pa.csv.ReadOptions(block_size=_BLOCK)
        return pa.csv.read_csv(stream, read_options=options, parse_options=parse, convert_options=text_only)


def _open_text(path: Path) -> Any:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _read_json(path: Path) -> pa.Table:
    """Read JSON lines, or one JSON array of objects."""
    with _open_text(path) as stream:
        first = next((line.strip() for line in stream if line.strip()), "")
    if first.startswith("["):
        return _read_array(path)
    if not first:
        raise DataProblem(f"{path} holds no rows")
    # not by Arrow, whose JSON reader takes the whole process down on some inputs
    return _from_rows(path, list(_checked_rows(path)))


def _read_array(path: Path) -> pa.Table:
    with _open_text(path) as stream:
        try:
            rows = json.load(stream)
        except json.JSONDecodeError as error:
            raise DataProblem(f"{path}, line {error.lineno}: not valid JSON", why=error.msg) from None
        except RecursionError:
            raise DataProblem(f"{path}: not valid JSON", why="nested too deeply") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataProblem(f"{path}, entry {number}: not an object with named columns")
    return _from_rows(path, rows)


def _from_rows(path: Path, rows: list[dict[str, Any]]) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    _check_types(path, rows)
    return pa.table({name: _column(path, name, [row.get(name) for row in rows]) for name in names})


def _column(path: Path, name: str, values: list[Any]) -> pa.Array:
    """One column; whole numbers that do not fit 64 bits become floating point.

    Raises:
        DataProblem: nested values of different types.
    """
    try:
        return pa.array(values, from_pandas=True)
    except (pa.ArrowException, OverflowError, UnicodeError) as error:
        if all(value is None or type(value) in (int, float) for value in values):
            with contextlib.suppress(OverflowError):
                return pa.array([None if value is None else float(value) for value in values], from_pandas=True)
        why = " ".join(str(error).split())[:200]
        raise DataProblem(f"{path}: column '{name}' cannot be read", why=why) from None


def _checked_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON lines file.

    Raises:
        DataProblem: a line is no JSON object, with its number.
    """
    with _open_text(path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataProblem(
                    f"{path}, line {number}: not valid JSON", why=error.msg, hint="one object a line"
                ) from None
            except RecursionError:
                raise DataProblem(f"{path}, line {number}: not valid JSON", why="nested too deeply") from None
            if not isinstance(row, dict):
                raise DataProblem(f"{path}, line {number}: not an object with named columns", hint="one object a line")
            yield row


def _check_types(path: Path, rows: list[dict[str, Any]]) -> None:
    """Refuse columns that change their type, naming the first row that does."""
    seen: dict[str, type] = {}
    for number, row in enumerate(rows, 1):
        for name, value in row.items():
            if value is None:
                continue
            kind = float if type(value) is int else type(value)
            if seen.setdefault(name, kind) is not kind:
                raise DataProblem(
                    f"{path}, row {number}: column '{name}' holds {value!r:.40}, before that {_called(seen[name])}",
                    hint="a column holds values of one type",
                )


def _called(kind: type) -> str:
    return {str: "text", float: "numbers", bool: "true/false", list: "lists", dict: "objects"}.get(kind, kind.__name__)
