"""Masked tokens that are the same whenever they are asked for.

Which tokens of a row are masked, and by what, is a function of seed, row and view, as with altered
images; each epoch is a view of its own, or one of `augment.views` in turn. So a resumed run goes on
with the same masks, and what a teacher says of a view can be kept.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdtool.data.examples import Examples
from kdtool.sections import AugmentSection
from kdtool.tasks._base import Batch, to_device
from kdtool.tasks._views import Views, uniforms

_WHICH, _HOW, _WHAT = 11, 12, 13  # one stream of random numbers each
_MASKED, _SWAPPED = 0.8, 0.1
"""Shares of the chosen tokens that become the mask, or a random token; the rest stays (Devlin et al. 2018)."""


@dataclass(frozen=True, slots=True)
class Masks:
    """How tokens are masked.

    Attributes:
        share: Of the tokens of a row that may be masked; at least one is.
        token: Id of the mask.
        others: [ordinary] ids that a token may be swapped for.
        seed: Of all masks.
    """

    share: float
    token: int
    others: np.ndarray
    seed: int

    def __call__(self, ids: np.ndarray, free: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
        """A row with some tokens masked, and which they are, [tokens] each.

        Args:
            ids: [tokens]
            free: [tokens] bool, what may be masked: at least one.
            number: Of the view, view * rows + row.
        """
        view = np.array([number])
        which, how, what = (uniforms(self.seed, stream, view, len(ids))[0] for stream in (_WHICH, _HOW, _WHAT))
        count = max(1, round(self.share * int(free.sum())))
        chosen = np.zeros(len(ids), dtype=bool)
        chosen[np.argsort(np.where(free, which, 2.0), kind="stable")[:count]] = True
        made = np.where(chosen & (how < _MASKED), self.token, ids)
        swapped = chosen & (how >= 1 - _SWAPPED)
        return np.where(swapped, self.others[(what * len(self.others)).astype(np.int64)], made), chosen


class MaskedViews(Views):
    """Makes batches of training rows with the masks of an epoch.

    Args:
        masks: How tokens are masked.
        collate: Makes a batch of rows and the numbers of their views.
        data: Encoded training rows.
        settings: Says how many views there are.
    """

    def __init__(
        self,
        masks: Masks,
        collate: Callable[[Sequence[Mapping[str, Any]], Sequence[int]], Batch],
        data: Examples,
        settings: AugmentSection,
    ) -> None:
        super().__init__(data, settings)
        self.masks, self.collate = masks, collate

    @property
    def mark(self) -> str:
        """Seed, share and number of the masks."""
        return json.dumps({"share": self.masks.share, "seed": self.masks.seed, "views": self.count})

    def batch(self, numbers: np.ndarray, device: str) -> Batch:
        """The views with these numbers, collated."""
        rows = [self.data[int(number) % len(self.data)] for number in numbers]
        return to_device(self.collate(rows, numbers.tolist()), device)
