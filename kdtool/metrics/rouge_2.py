"""ROUGE-2: shared pairs of words of a generated text and its reference, as F1 (Lin 2004)."""

from kdtool.metrics._rouge import rouge
from kdtool.metrics._texts import Texts

higher_is_better: bool = True
bounds: tuple[float, float | None] = (0.0, 1.0)
compares: str = "texts"
library: str = "rouge_score"


def measured(texts: Texts) -> tuple[float, float]:
    """Mean F1 of bigrams and its standard error."""
    return rouge(texts, "rouge2")


def compute(texts: Texts) -> float:
    """Mean F1, 0 to 1."""
    return measured(texts)[0]
