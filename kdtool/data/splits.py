"""Which split serves for what: training, choices, the final proof."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdtool.data.layout import TEST_NAMES, TRAIN_NAMES, VALIDATION_NAMES
from kdtool.errors import DataProblem, nearest
from kdtool.sections import DataSection

_HOLDOUT, _LIMIT, _TEST_LIMIT = 101, 102, 103  # one random stream each, so that one choice does not move another


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """Names of the splits in use.

    Attributes:
        train: To learn from; None where the source has nothing for it.
        validation: For choices during training; None where there is none.
        test: For the final proof; None when it is to be held out of train.
    """

    train: str | None
    validation: str | None
    test: str | None

    @property
    def names(self) -> list[str]:
        """The splits to read, train first."""
        return [name for name in (self.train, self.validation, self.test) if name is not None]


def plan_splits(known: Sequence[str], config: DataSection, score_only: bool) -> SplitPlan:
    """Choose splits as configured, else by their usual names.

    Raises:
        DataProblem: an unknown split, one split for two purposes, or nothing to score.
    """
    for key in ("train_split", "validation_split", "test_split"):
        name = getattr(config, key)
        if name is not None and name not in known:
            raise DataProblem(f"the data has no split '{name}' (data.{key})", hint=nearest(name, known))
    if score_only and len(known) == 1:
        return SplitPlan(None, None, known[0])
    usual = {*VALIDATION_NAMES, *TEST_NAMES}
    only = known[0] if len(known) == 1 and known[0] not in usual else None
    train = config.train_split or _first(TRAIN_NAMES, known) or only
    free = [name for name in known if name not in (train, config.validation_split)]
    test = config.test_split or _first(TEST_NAMES, free)
    validation = config.validation_split or _first(VALIDATION_NAMES, [name for name in free if name != test])
    if test is None and validation is not None and config.validation_split is None:
        test, validation = validation, None
    if test is None and train is None:
        raise DataProblem(
            "the data has no split to train on or to score",
            why=f"splits: {', '.join(known)}",
            hint=f"name them: --set data.train_split={known[0]}, --set data.test_split=...",
        )
    chosen = [name for name in (train, validation, test) if name is not None]
    if len(set(chosen)) < len(chosen):
        twice = next(name for name in chosen if chosen.count(name) > 1)
        raise DataProblem(
            f"split '{twice}' is chosen for two purposes",
            why="what is learnt from or chosen by cannot also be the proof",
            hint=f"splits: {', '.join(known)}",
        )
    return SplitPlan(train, validation, test)


def _first(names: Sequence[str], known: Sequence[str]) -> str | None:
    return next((name for name in names if name in known), None)


def hold_out(size: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut rows into those to train on and those held out: at random, reproducible, each in data order.

    Raises:
        DataProblem: there are fewer than two rows.
    """
    if size < 2:
        raise DataProblem(f"{size} row cannot be cut into train and test", hint="give more data, or a test split")
    count = min(max(1, round(size * share)), size - 1)
    order = np.random.default_rng([seed, _HOLDOUT]).permutation(size)
    return np.sort(order[count:]), np.sort(order[:count])


def choose(size: int, limit: int | None, seed: int, test: bool = False) -> np.ndarray | None:
    """Positions of at most `limit` rows, chosen at random, in data order; None when all stay."""
    if limit is None or limit >= size:
        return None
    generator = np.random.default_rng([seed, _TEST_LIMIT if test else _LIMIT])
    return np.sort(generator.permutation(size)[:limit])
