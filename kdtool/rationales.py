"""Chains of thought: prompts, answers in them, what is right, and what is twice there (Mentor-KD).

A target text is "CHAIN --> ANSWER". Answers are found by data set, as the published evaluation does,
with its peculiarities: letters of commonsense_qa are found inside words, and "18.0" is not "18" in
gsm8k unless `numeric` asks for it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

MARK = "-->"
"""Stands between chain and answer."""

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_LETTERS = {"commonsense_qa": "[ABCDE]", "date_understanding": "[ABCDEF]", "tracking_shuffled_objects": "[ABC]"}
_LETTERS["tracking"] = _LETTERS["tracking_shuffled_objects"]
_AS_FLOATS = frozenset({"svamp", "addsub", "single_eq"})
_CLOSE = 1e-6

DATASETS: tuple[str, ...] = (
    *_LETTERS,
    "gsm8k",
    "asdiv",
    *sorted(_AS_FLOATS),
    "multiarith",
    "aqua",
    "strategy_qa",
    "last_letter_concatenation",
)
"""Data sets with rules of their own; any other name is read as arithmetic."""

Answer = str | float


@dataclass(frozen=True, slots=True)
class Rationale:
    """One row of annotations.

    Attributes:
        input: The question.
        chain: The reasoning.
        answer: The true answer.
        initial_correct: Whether the answer that the chain ended in was right.
    """

    input: str
    chain: str
    answer: str
    initial_correct: bool = True


def target(chain: str, answer: str) -> str:
    """The text that a student learns: chain, mark, answer."""
    return f"{chain.strip()} {MARK} {answer.strip()}"


def prompts(question: str, chain: str | None = None) -> str:
    """The prompt for a chain, or, once there is one, for the answer."""
    asked = f"Q: {question.strip()}\nA: Let's think step by step."
    return asked if chain is None else f"{asked} {chain.strip()}\nTherefore, the answer is"


def split(text: str) -> tuple[str, str | None]:
    """Chain and what follows the first mark; None where there is none."""
    chain, mark, rest = text.partition(MARK)
    return chain.strip(), rest if mark else None


def extract(text: str, dataset: str) -> Answer:
    """The answer in a prediction: the first candidate behind the mark, without a mark the last of all.

    Args:
        text: What a model wrote.
        dataset: Name, with underscores.

    Returns:
        The answer; the text that was looked at where it holds no candidate; a float for data sets compared so.
    """
    _, rest = split(text)
    seen = text if rest is None else rest
    seen, candidates = _candidates(seen, dataset)
    if not candidates:
        return seen
    found = candidates[-1] if rest is None else candidates[0]
    return float(found) if dataset in _AS_FLOATS else found


def _candidates(text: str, dataset: str) -> tuple[str, list[str]]:
    """The text as it is looked at, and the answers in it."""
    if dataset in _LETTERS:
        return text, re.findall(_LETTERS[dataset], text)
    if dataset == "strategy_qa":
        text = re.sub("[\"'\n.\\s:,]", " ", text.lower())
        return text, [word for word in text.split(" ") if word in ("yes", "no")]
    if dataset == "last_letter_concatenation":
        text = re.sub("[\"'.\\s]", "", text)
        return text, [text] if text else []
    text = text.replace(",", "")
    return text, _NUMBER.findall(text)


def clean(gold: str, dataset: str) -> Answer:
    """The true answer as it is compared: a float for data sets compared so, else text."""
    if dataset == "commonsense_qa":
        first = gold.split()[:1]
        return first[0][0] if first else gold
    if dataset == "strategy_qa":
        return gold.lower()
    if dataset in _LETTERS or dataset == "last_letter_concatenation":
        return gold
    plain = gold.replace(",", "")
    return float(plain) if dataset in _AS_FLOATS else plain


def correct(found: Answer, gold: Answer, dataset: str, numeric: bool = False) -> bool:
    """Whether an extracted answer equals a cleaned true one.

    Args:
        found: From `extract`.
        gold: From `clean`.
        dataset: Name.
        numeric: Compare arithmetic answers as numbers for every data set.
    """
    if isinstance(gold, float) or (numeric and _is_number(gold) and _is_number(found)):
        return _is_number(found) and abs(float(found) - float(gold)) < _CLOSE
    if dataset == "last_letter_concatenation":
        return str(found).lower() == gold.lower()
    return found == gold


def _is_number(value: Answer) -> bool:
    return isinstance(value, float) or _NUMBER.fullmatch(value) is not None


def usable(rows: Iterable[Rationale], distinct: bool = True) -> list[Rationale]:
    """Rows to learn from: those that ended in the right answer, each once.

    Args:
        rows: Annotations.
        distinct: Drop repeated pairs of question and chain, ignoring case and spacing; the first stays.
    """
    seen: set[tuple[str, str]] = set()
    kept = []
    for row in rows:
        key = (" ".join(row.input.split()).lower(), " ".join(row.chain.split()).lower())
        if row.initial_correct and not (distinct and key in seen):
            seen.add(key)
            kept.append(row)
    return kept
