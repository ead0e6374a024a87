"""Exact answer: share of generated texts whose final answer is that of the reference.

By the rule `number` the answer is what stands behind `####`, or behind `-->`, else the last number of the text, and
numbers are compared as numbers. By `text` the whole texts are compared but for white space. A data set's name takes
its published rules (`kdtool.rationales`).
"""

from kdtool import rationales
from kdtool.metrics._texts import Texts, mean_and_error

higher_is_better: bool = True
bounds: tuple[float, float | None] = (0.0, 1.0)
compares: str = "texts"

RULES: tuple[str, ...] = ("number", "text", *rationales.DATASETS)
"""Ways to find an answer."""

_MARK = "####"
_ARITHMETIC = "gsm8k"


def agrees(prediction: str, reference: str, rule: str) -> bool:
    """Whether a prediction ends in the reference's answer.

    Args:
        prediction: What a model wrote.
        reference: A chain with its answer, or the answer alone.
        rule: One of `RULES`.
    """
    if rule == "text":
        return prediction.split() == reference.split()
    number = rule == "number"
    dataset = _ARITHMETIC if number else rule
    found = rationales.extract(_marked(prediction) if number else prediction, dataset)
    if number:
        gold = str(rationales.extract(_marked(reference), dataset))
    else:
        _, behind = rationales.split(reference)
        gold = (reference if behind is None else behind).strip()
    try:
        return rationales.correct(found, rationales.clean(gold, dataset), dataset, numeric=number)
    except ValueError:
        return False  # a reference without a number, where the data set compares numbers


def _marked(text: str) -> str:
    """A text with the mark of rationales in place of that of GSM8K."""
    return text.replace(_MARK, rationales.MARK)


def measured(texts: Texts) -> tuple[float, float]:
    """Share of right answers and its standard error."""
    pairs = zip(texts.predictions, texts.references, strict=True)
    return mean_and_error([float(agrees(*pair, texts.answers)) for pair in pairs])


def compute(texts: Texts) -> float:
    """Share of right answers, 0 to 1."""
    return measured(texts)[0]
