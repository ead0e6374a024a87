"""ROUGE by the rouge-score library: F1 between 0 and 1, words in lower case, no stemming."""

from kdtool.metrics._texts import Texts, library, mean_and_error


def rouge(texts: Texts, kind: str) -> tuple[float, float]:
    """Mean F1 over texts and its standard error.

    Args:
        texts: Predictions and references.
        kind: `rouge1`, `rouge2` or `rougeL`, as the library calls them.

    Raises:
        UsageProblem: rouge-score is not installed.
    """
    scorer = library("rouge_score.rouge_scorer", "rouge").RougeScorer([kind], use_stemmer=False)
    pairs = zip(texts.references, texts.predictions, strict=True)
    return mean_and_error([scorer.score(reference, prediction)[kind].fmeasure for reference, prediction in pairs])
