"""Texts that methods of language models learn from."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdtool.generation import Generated, Interleaving, Source


@dataclass(frozen=True, slots=True)
class Text:
    """Texts of a step.

    Attributes:
        ids: [rows, length], padded on the right.
        counts: [rows, length] bool, true for tokens that the loss counts.
        positions: [rows, length] places of tokens where several texts share a row, else None.
        written: Whether a model wrote them.
        source: What encoders read; None where models have none.
        log_prob: [rows, length] float64, log-probability of written tokens where it was noted, else None.
        parts: Sums for the log.
        units: Units of those parts that are not over the tokens that count.
    """

    ids: Tensor
    counts: Tensor
    positions: Tensor | None = None
    written: bool = False
    source: Source | None = None
    log_prob: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    units: dict[str, Tensor] = field(default_factory=dict)


def joined(ids: Tensor, first: Tensor, out: Generated, settings: Interleaving, source: Source | None) -> Text:
    """Prompts and what was written after them, padded on the right."""
    width = int((first + out.valid.sum(1)).max())
    place = torch.arange(width, device=ids.device) - first[:, None]
    longest = out.tokens.shape[1]
    inside = place.clamp(0, longest - 1)
    counts = out.valid.gather(1, inside) & (place >= 0) & (place < longest)
    prompts = torch.nn.functional.pad(ids, (0, max(0, width - ids.shape[1])))[:, :width]
    written = torch.where(counts, out.tokens.gather(1, inside), settings.pad)
    log_prob = torch.where(counts, out.log_prob.gather(1, inside), 0.0) if settings.scored else None
    return Text(torch.where(place < 0, prompts, written), counts, None, True, source, log_prob)
