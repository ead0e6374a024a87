"""Texts that a frozen teacher writes once for each row, and that later epochs and resumed runs take as they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from kdtool.errors import OutputProblem
from kdtool.generation import Generated
from kdtool.journal import as_lines, read_rows
from kdtool.writing import write_bytes

NAME = "texts"


class Once:
    """Token ids of texts by the numbers of their rows, in memory and line by line in files of a folder.

    A text written again in another batch could differ where two tokens are equally likely but for rounding, so a
    resumed run reads what the interrupted one wrote. A line is an object: `row`, `tokens` (ids) and `text`. Each
    process has a file of its own, and reads those of all.

    Args:
        tokenizer: Turns ids into text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.texts: dict[int, Tensor] = {}
        self._path: Path | None = None

    def open(self, folder: Path) -> None:
        """Take up what earlier processes of this run left in a folder; the first time alone."""
        if self._path is not None:
            return
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self._path = folder / (f"{NAME}.jsonl" if rank == 0 else f"{NAME}.{rank}.jsonl")
        for path in sorted(folder.glob(f"{NAME}*.jsonl")):
            lines = read_rows(path)
            for line in lines:
                self.texts.setdefault(int(line["row"]), torch.tensor(line["tokens"], dtype=torch.int32))
            if path == self._path:
                write_bytes(path, as_lines(lines))  # without a line that a kill cut short

    def missing(self, rows: Sequence[int]) -> list[int]:
        """Places of the rows that have no text yet."""
        return [place for place, row in enumerate(rows) if row not in self.texts]

    def add(self, rows: Sequence[int], out: Generated) -> None:
        """Keep the texts of rows.

        Raises:
            OutputProblem: the file cannot be written.
        """
        lines = []
        for row, tokens, valid in zip(rows, out.tokens.cpu(), out.valid.cpu(), strict=True):
            self.texts[row] = tokens[valid].int()
            ids = tokens[valid].tolist()
            lines.append({"row": row, "tokens": ids, "text": self.tokenizer.decode(ids)})
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(as_lines(lines))
        except OSError as error:
            raise OutputProblem(f"cannot write {self._path.name}", why=error.strerror, hint="free some space") from None

    def of(self, rows: Sequence[int], pad: int, device: torch.device) -> Generated:
        """The texts of rows, as if just written."""
        found = [self.texts[row] for row in rows]
        longest = max(1, *map(len, found))
        tokens = torch.full((len(found), longest), pad, dtype=torch.long)
        valid = torch.zeros_like(tokens, dtype=torch.bool)
        for i, text in enumerate(found):
            tokens[i, : len(text)], valid[i, : len(text)] = text, True
        tokens, valid = tokens.to(device), valid.to(device)
        return Generated(tokens, valid, valid, tokens, torch.zeros_like(tokens, dtype=torch.float64))
