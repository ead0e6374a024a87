"""Rationales for the questions of a data set: written by a teacher or a mentor, or read from a file; judged; chosen.

Rows of the files are the published record (`input`, `chain`, `answer`, `initial_correct`), with the number
of the question, that of the sample, and a `provenance`.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdtool import rationales
from kdtool.authors import Author, Key, Order, Style
from kdtool.data.examples import Examples
from kdtool.data.readers import file_sha256, read_table, table_suffix
from kdtool.errors import DataProblem
from kdtool.journal import Row, as_lines, key_of, read_rows, written
from kdtool.metrics.exact_answer import RULES, agrees
from kdtool.rationales import MARK, Rationale
from kdtool.tasks._prompts import asked as prompts_of
from kdtool.writing import write_bytes

_STOP = ("\nQ:",)
"""Where a model that goes on from "Q: ... A: ..." begins a question of its own."""

_NAMES = {
    "input": ("input", "question", "prompt"),
    "chain": ("chain", "rationale", "reasoning"),
    "answer": ("answer",),
    "initial_correct": ("initial_correct", "correct"),
}


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its true answer."""

    text: str
    answer: str


def spelling(text: str) -> str:
    """A question without what is often written otherwise: case and spacing."""
    return " ".join(text.split()).lower()


def questions_of(rows: Examples, rule: str) -> list[Question]:
    """The different questions of a data set, in order.

    Raises:
        DataProblem: no questions with answers, an answer that cannot be one, or two answers to a question.
    """
    if not {"prompt", "response"} <= set(rows.columns):
        raise DataProblem(
            "rationales need questions with answers",
            hint="name their columns: --set data.prompt=question --set data.response=answer",
        )
    found: dict[str, Question] = {}
    for number, (prompt, answer) in enumerate(zip(prompts_of(rows, "\n"), rows.columns["response"], strict=True), 1):
        question = Question(prompt.strip(), answer.strip())
        _check_gold(question, rule, number)
        first = found.setdefault(spelling(question.text), question)
        if first.answer != question.answer:
            raise DataProblem(
                f"row {number}: the answer is '{question.answer}', and that of the same question before it "
                f"'{first.answer}'"
            )
    return list(found.values())


def _check_gold(question: Question, rule: str, number: int) -> None:
    """Refuse true answers that the rule cannot read."""
    if not question.answer:
        raise DataProblem(f"row {number}: a question without an answer", hint="rationales are judged by it")
    if not agrees(f"{MARK} {question.answer}", question.answer, rule):
        raise DataProblem(
            f"row {number}: '{question.answer:.40}' is no answer by the rule '{rule}'",
            hint=f"--set eval.answers=RULE, one of {', '.join(RULES)}",
        )


def annotate(
    folder: Path, author: Callable[[], Author], questions: Sequence[Question], samples: int, style: Style, rule: str
) -> list[Row]:
    """Rationales of a teacher in two calls (zero-shot chain of thought): the reasoning, then the answer to it.

    Args:
        folder: Keeps `chains.jsonl` and `annotations.jsonl`.
        author: Gives the teacher, once there is something to write.
        questions: The questions.
        samples: Rationales for each.
        style: How chains are drawn; answers are the most likely ones.
        rule: How answers are found, one of `kdtool.metrics.exact_answer.RULES`.
    """
    style = Style(style.seed, style.temperature, style.top_p, style.max_tokens, _STOP, style.chat)
    orders = [
        Order(rationales.prompts(question.text), tuple((number, sample) for sample in range(samples)))
        for number, question in enumerate(questions)
    ]
    chains = written(folder / "chains.jsonl", author, orders, style, lambda _, text: {"text": text.strip()})
    texts: dict[Key, str] = {key_of(row): row["text"] for row in chains}

    def judge(key: Key, text: str) -> Row:
        question, chain = questions[key[0]], texts[key].replace(MARK, "->")
        return _judged(question, chain, f"{chain} {MARK} {text.strip()}", rule)

    asked = [Order(rationales.prompts(questions[key[0]].text, texts[key]), (key,)) for key in sorted(texts)]
    short = Style(style.seed, 0.0, 1.0, min(64, style.max_tokens), ("\n", *_STOP), style.chat)
    return written(folder / "annotations.jsonl", author, asked, short, judge)


def augment(
    folder: Path, author: Callable[[], Author], questions: Sequence[Question], samples: int, style: Style, rule: str
) -> list[Row]:
    """Rationales of a mentor, who writes chain and answer at once; `augmented.jsonl`."""
    orders = [
        Order(question.text, tuple((number, sample) for sample in range(samples)))
        for number, question in enumerate(questions)
    ]

    def judge(key: Key, text: str) -> Row:
        return _judged(questions[key[0]], rationales.split(text)[0], text, rule)

    return written(folder / "augmented.jsonl", author, orders, style, judge)


def respond(folder: Path, author: Callable[[], Author], prompts: Sequence[str], style: Style) -> list[Row]:
    """One answer to each prompt, for learning from them as they are; `responses.jsonl`."""
    orders = [Order(prompt, ((number, 0),)) for number, prompt in enumerate(prompts)]

    def make(key: Key, text: str) -> Row:
        return {"prompt": prompts[key[0]], "response": text.strip()}

    return written(folder / "responses.jsonl", author, orders, style, make)


def _judged(question: Question, chain: str, prediction: str, rule: str) -> Row:
    """The record of a rationale, with the gold answer."""
    right = bool(chain.strip()) and agrees(prediction, question.answer, rule)
    return {
        "input": question.text,
        "chain": chain,
        "answer": question.answer,
        "initial_correct": right,
        "prediction": prediction,
    }


def from_file(path: Path, target: Path, questions: Sequence[Question], rule: str) -> list[Row]:
    """Rationales of a file for the questions at hand, written to `target` in our form.

    Rows about other questions are left out. A row is right if its file says so and its answer is the true one; where
    the file does not say, if its chain ends in the true answer.

    Args:
        path: A table of questions, chains and answers.
        target: File of the stage.
        questions: The questions.
        rule: How answers are found, one of `kdtool.metrics.exact_answer.RULES`.

    Raises:
        DataProblem: no such file, columns are missing, or no row is about these questions.
    """
    if target.is_file():
        return read_rows(target)
    columns = _read(path)
    numbers = {spelling(question.text): number for number, question in enumerate(questions)}
    digest, count = file_sha256(path), [0] * len(questions)
    rows: list[Row] = []
    for place, values in enumerate(zip(*columns.values(), strict=True)):
        found = dict(zip(columns, values, strict=True))
        number = numbers.get(spelling(str(found["input"])))
        if number is None:
            continue
        row = _as_row(found, questions[number], rule)
        row |= {"question": number, "sample": count[number]}
        rows.append(row | {"provenance": {"file": path.name, "sha256": digest, "row": place + 1}})
        count[number] += 1
    if not rows:
        raise DataProblem(f"{path.name} holds no rationale for any of {len(questions)} training questions")
    rows.sort(key=lambda row: (row["question"], row["sample"]))
    write_bytes(target, as_lines(rows))
    return rows


def _read(path: Path) -> dict[str, list[Any]]:
    """Columns of a file of rationales, by our names."""
    if not path.is_file():
        raise DataProblem(f"file of rationales '{path}' does not exist")
    if table_suffix(path.name) is None:
        raise DataProblem(f"'{path}' is no table of rationales", hint="a .jsonl, .jsonl.gz, .csv or .parquet file")
    table = read_table(path)
    found: dict[str, list[Any]] = {}
    for role, names in _NAMES.items():
        name = next((name for name in names if name in table.column_names), None)
        if name is not None:
            found[role] = table.column(name).to_pylist()
        elif role != "initial_correct":
            raise DataProblem(
                f"{path.name} has no column '{names[0]}'",
                why=f"columns: {', '.join(table.column_names)}",
                hint=f"rationales have the columns {', '.join(list(_NAMES)[:3])}, and initial_correct if it is known",
            )
    return found


def _as_row(found: Mapping[str, Any], question: Question, rule: str) -> Row:
    """Our record of a row of a file."""
    chain, stated = str(found["chain"] or "").strip(), str(found["answer"] if found["answer"] is not None else "")
    if found.get("initial_correct") is None:
        return _judged(question, chain, chain, rule)
    right = bool(chain) and _flag(found["initial_correct"]) and agrees(f"{MARK} {stated}", question.answer, rule)
    chain = chain.replace(MARK, "->")
    return {"input": question.text, "chain": chain, "answer": question.answer, "initial_correct": right}


def _flag(value: Any) -> bool:
    """A truth value, which formats without types write as a word."""
    return value.strip().lower() in ("true", "1", "yes") if isinstance(value, str) else bool(value)


def chosen(rows: Iterable[Row], keep: int, seed: int, distinct: bool) -> list[Row]:
    """Right rows, at most `keep` of each question, drawn by seed and question; 0 keeps all.

    Args:
        rows: Judged rows, in order.
        keep: Most rows of a question.
        seed: Of the draws.
        distinct: Drop repeated pairs of question and chain.
    """
    right: dict[int, list[Row]] = {}
    for row in _usable(list(rows), distinct):
        right.setdefault(row["question"], []).append(row)
    made: list[Row] = []
    for number in sorted(right):
        own = right[number]
        if keep and len(own) > keep:
            digest = hashlib.sha256(repr((seed, number)).encode()).digest()
            generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
            own = [own[i] for i in sorted(generator.choice(len(own), keep, replace=False))]
        made += own
    return made


def _usable(rows: list[Row], distinct: bool) -> list[Row]:
    """Rows to learn from; see `kdtool.rationales.usable`."""
    records = [Rationale(row["input"], row["chain"], row["answer"], row["initial_correct"]) for row in rows]
    kept = {id(record) for record in rationales.usable(records, distinct)}
    return [row for row, record in zip(rows, records, strict=True) if id(record) in kept]


def as_examples(rows: Sequence[Row]) -> Examples:
    """Prompts and responses to learn from.

    Raises:
        DataProblem: there is none.
    """
    if not rows:
        raise DataProblem(
            "no rationale ends in the right answer",
            hint="ask for more samples or another teacher, and check eval.answers",
        )
    prompts = [str(row["input"]) for row in rows]
    responses = [rationales.target(row["chain"], row["answer"]) for row in rows]
    return Examples({"prompt": prompts, "response": responses})
