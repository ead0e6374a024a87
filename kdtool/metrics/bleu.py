"""BLEU: n-grams of words of generated texts found in their references (Papineni et al. 2002, by sacrebleu)."""

from kdtool.metrics._sacrebleu import corpus
from kdtool.metrics._texts import Texts

higher_is_better: bool = True
bounds: tuple[float, float | None] = (0.0, 100.0)
compares: str = "texts"
library: str = "sacrebleu"


def measured(texts: Texts) -> tuple[float, float]:
    """Score of all texts together and its standard error."""
    return corpus(texts, "BLEU")


def compute(texts: Texts) -> float:
    """Score of all texts together, 0 to 100."""
    return measured(texts)[0]
