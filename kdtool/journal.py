"""Files of rows that are made one by one, or bought: a kill loses what is under way, and nothing comes twice.

While rows are made they are appended to `NAME.jsonl.part`, in the order in which they come; when all
are there they are written to `NAME.jsonl`, sorted by key, in one rename.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kdtool.authors import Author, Key, Order, Style, provenance
from kdtool.errors import OutputProblem
from kdtool.writing import write_bytes

Row = dict[str, Any]


def as_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """JSON lines."""
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """Rows of a file; a last line that a kill cut short is left out."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    rows = []
    for line in lines[:-1]:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # nothing after a damaged line is trusted
    return rows


def key_of(row: Mapping[str, Any]) -> Key:
    """Key of a row."""
    return (int(row["question"]), int(row["sample"]))


class Journal:
    """Appends rows and remembers which are there; use as a context manager.

    Args:
        path: The file in the end, such as `annotations.jsonl`.
        expected: Key to provenance of the rows to be made; what was appended before with another one is dropped.

    Raises:
        OutputProblem: it cannot be written.
    """

    def __init__(self, path: Path, expected: Mapping[Key, Mapping[str, Any]]) -> None:
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.rows: dict[Key, Row] = {}
        for row in read_rows(self.part):
            if expected.get(key_of(row)) == row.get("provenance"):
                self.rows.setdefault(key_of(row), row)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.part, as_lines(self.rows.values()))
            self._stream = self.part.open("ab")
        except OSError as error:
            raise OutputProblem(f"cannot write {self.part}", why=error.strerror) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stream.close()

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows that are not there yet, and see them on the disk."""
        fresh = [row for row in rows if key_of(row) not in self.rows]
        self._stream.write(as_lines(fresh))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.rows |= {key_of(row): row for row in fresh}

    def finish(self) -> list[Row]:
        """Put all rows in order into the file."""
        rows = [self.rows[key] for key in sorted(self.rows)]
        write_bytes(self.path, as_lines(rows))
        self.part.unlink()
        return rows


def written(
    path: Path, author: Callable[[], Author], orders: Sequence[Order], style: Style, make: Callable[[Key, str], Row]
) -> list[Row]:
    """The rows of a stage in which an author writes; what is on disk is not written again.

    Args:
        path: File of the stage.
        author: Gives who writes; not called where everything is there.
        orders: What is to be written.
        style: How to draw.
        make: From the key of a text and the text to the fields of its row, besides key and provenance.
    """
    if path.is_file():
        return read_rows(path)
    writer = author()
    facts = writer.facts()
    expected = {key: provenance(facts, style, order.prompt, key) for order in orders for key in order.keys}
    with Journal(path, expected) as journal:

        def known(order: Order) -> bool:
            return all(key in journal.rows for key in order.keys)

        def done(order: Order, texts: list[str]) -> None:
            rows = []
            for key, text in zip(order.keys, texts, strict=True):
                place = {"question": key[0], "sample": key[1]}
                rows.append({**make(key, text), **place, "provenance": expected[key]})
            journal.add(rows)

        writer.write(orders, style, known, done)
        return journal.finish()
