"""What all language models share: a unit is a predicted token, and figures are means over those that count."""

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdtool.data.batching import ordered_batches
from kdtool.data.examples import Examples
from kdtool.run import Run
from kdtool.tasks import _base
from kdtool.tasks._base import LABELS, Batch, Evaluation, to_device

IGNORED = -100
"""Label of tokens that do not count, as transformers has it."""

_LARGEST = 700.0  # nats whose exponential is still a float


class LanguageTask(_base.Task):
    """Base of the tasks whose units are tokens; a subclass says how inputs are made and which tokens count."""

    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token-accuracy")
    default_lr: ClassVar[float] = 5e-4
    classifies: ClassVar[bool] = False

    def units(self, batch: Batch) -> Tensor:
        """How many units each row of a batch has, [rows] int64; `forward` gives them row by row."""
        raise NotImplementedError

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        data: Examples,
        run: Run,
        metrics: Sequence[str],
        batch_size: int,
        teacher: int | None = None,
    ) -> Evaluation:
        """Mean loss in nats per counted token, perplexity, share of counted tokens predicted right.

        Standard errors treat rows as independent.
        """
        model.eval()
        sums = np.zeros((3, len(data)))  # loss, hits, units
        for rows in ordered_batches(data.lengths, len(data), batch_size):
            batch = to_device(self.collate([data[int(i)] for i in rows]), run.device)
            out = self.forward(model, batch)
            assert out.labels is not None
            units = self.units(batch)
            owner = torch.arange(len(rows), device=units.device).repeat_interleave(units)
            loss = functional.cross_entropy(out.logits.float(), out.labels, reduction="none").double()
            hits = (out.logits.argmax(-1) == out.labels).double()
            found = torch.zeros(2, len(rows), dtype=torch.float64, device=units.device)
            found.index_add_(1, owner, torch.stack([loss, hits]))
            sums[:, rows] = torch.cat([found, units.double()[None]]).cpu().numpy()
        values, errors = _figures(*sums)
        chosen = [name for name in metrics if name in values]
        return Evaluation(
            {name: values[name] for name in chosen}, {name: errors[name] for name in chosen}, None, None, len(data)
        )

    def example_inputs(self, data: Examples, batch_size: int, teacher: int | None = None) -> Batch:
        """A batch of real rows without labels."""
        batch = self.collate([data[i % len(data)] for i in range(batch_size)])
        return {key: value for key, value in batch.items() if key != LABELS}


def _figures(losses: np.ndarray, hits: np.ndarray, units: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics and their standard errors from sums of each row."""
    loss, loss_error = ratio_and_error(losses, units)
    accuracy, accuracy_error = ratio_and_error(hits, units)
    perplexity = math.exp(loss) if loss < _LARGEST else math.inf
    values = {"loss": loss, "perplexity": perplexity, "token-accuracy": accuracy}
    return values, {"loss": loss_error, "perplexity": perplexity * loss_error, "token-accuracy": accuracy_error}


def ratio_and_error(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Mean over units of independent rows, and its standard error to first order.

    Args:
        sums: [rows] sums over each row's units.
        counts: [rows] number of units.
    """
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return mean, math.nan
    apart = sums - mean * counts
    return mean, float(math.sqrt(len(sums) / (len(sums) - 1) * np.square(apart).sum()) / counts.sum())
