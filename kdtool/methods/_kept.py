"""What was generated, line by line in a file beside the result."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor
from torch import distributed as dist

from kdtool.errors import OutputProblem
from kdtool.generation import Generated, Scorer

NAME = "generations.jsonl"


class Kept:
    """A file of generations that a resumed run goes on with.

    A line is an object: `step`, `row` (number in the training data), `prompt` and `tokens` (ids), `text` (the
    tokens as text), and where a teacher repaired `acceptance` (share of tokens that the student proposed) and
    `teacher_log_likelihood` (mean over tokens).

    Args:
        tokenizer: Turns ids into text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._path: Path | None = None

    def add(
        self,
        folder: Path,
        step: int,
        rows: Tensor,
        ids: Tensor,
        first: Tensor,
        out: Generated,
        teacher: Scorer | None,
    ) -> None:
        """Append one line for each row.

        Args:
            folder: Where the file lies.
            step: Number of the step, from 1.
            rows: Numbers of the rows.
            ids: [rows, length] prompts, and perhaps texts behind them, padded on the right.
            first: [rows] tokens of each prompt.
            out: What was generated.
            teacher: Who repaired; None if nobody did.

        Raises:
            OutputProblem: the file cannot be written.
        """
        lines = []
        for i, row in enumerate(rows.tolist()):
            valid = out.valid[i]
            tokens = out.tokens[i][valid].tolist()
            line = {"step": step, "row": row, "prompt": ids[i, : int(first[i])].tolist(), "tokens": tokens}
            line["text"] = self.tokenizer.decode(tokens)
            if teacher is not None and tokens:
                line["acceptance"] = round(float(out.kept[i][valid].double().mean()), 4)
                line["teacher_log_likelihood"] = round(float(out.log_prob[i].sum()) / len(tokens), 4)
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        try:
            with self._opened(folder, step).open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:
            raise OutputProblem(
                f"cannot write {NAME}",
                why=error.strerror,
                hint="free some space, or --set method.save_generations=false",
            ) from None

    def _opened(self, folder: Path, step: int) -> Path:
        """The file; the first time without what an interrupted run wrote after its last checkpoint."""
        if self._path is None:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / (NAME if rank == 0 else f"generations.{rank}.jsonl")
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                path.write_text("".join(line for line in lines if _step(line) < step), encoding="utf-8")
            self._path = path
        return self._path


def _step(line: str) -> float:
    """The step of a line; infinite where a kill left it half-written."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")
