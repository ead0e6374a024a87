"""Corpus metrics by the sacrebleu library, between 0 and 100, with errors by its bootstrap."""

from kdtool.metrics._texts import Texts, library

_RESAMPLES = 200
_INTERVAL = 1.96
"""Half a 95 % interval in standard errors."""


def corpus(texts: Texts, kind: str) -> tuple[float, float]:
    """A corpus score and its standard error, from resampled texts.

    Args:
        texts: Predictions and references.
        kind: `BLEU` or `CHRF`, with sacrebleu's own settings.

    Raises:
        UsageProblem: sacrebleu is not installed.
    """
    metric = getattr(library("sacrebleu", kind.lower()), kind)()
    found = metric.corpus_score(list(texts.predictions), [list(texts.references)], n_bootstrap=_RESAMPLES)
    return float(found.score), float(found._ci) / _INTERVAL
