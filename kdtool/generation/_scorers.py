"""Models with a memory of what they have read."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Scorer(Protocol):
    """A model with a memory of what it has read."""

    def begin(self, ids: Tensor, mask: Tensor) -> None:
        """Forget everything and read left-padded prompts [rows, n] but for their last token.

        Args:
            ids: Token ids.
            mask: 1 for tokens, 0 for padding.
        """

    def feed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Read tokens [rows, n] at positions [rows, n]; next-token logits [rows, n, vocabulary]."""

    def keep(self, counts: Tensor, fed: int) -> None:
        """Of the last `fed` tokens of each row remember the first `counts` [rows]."""

    def select(self, rows: Tensor) -> None:
        """Forget all rows but those numbered."""


class CachedModel:
    """A causal language model of transformers with its key/value cache.

    Args:
        model: The model; the caller puts it into eval mode.
        vocabulary: Logits are cut to this many tokens, where heads are padded; None for all.
    """

    def __init__(self, model: nn.Module, vocabulary: int | None = None) -> None:
        self.model: Any = model
        self.vocabulary = vocabulary
        self._cache: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.long)
        self._gaps = False  # whether the mask hides anything: without it attention is faster

    def begin(self, ids: Tensor, mask: Tensor) -> None:
        """Read the prompts but for their last token, without making logits."""
        self._cache, self._mask = None, mask[:, :-1]
        self._gaps = bool((self._mask == 0).any())
        if ids.shape[1] > 1:
            positions = (self._mask.cumsum(-1) - 1).clamp_min(0)
            self._cache = self._read(self.model.base_model, ids[:, :-1], positions).past_key_values

    def feed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Read on."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(tokens.shape)], 1)
        out = self._read(self.model, tokens, positions)
        self._cache = out.past_key_values
        logits: Tensor = out.logits
        return logits if self.vocabulary is None else logits[..., : self.vocabulary]

    def _read(self, model: Any, tokens: Tensor, positions: Tensor) -> Any:
        return model(
            input_ids=tokens,
            attention_mask=self._mask if self._gaps else None,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )

    def keep(self, counts: Tensor, fed: int) -> None:
        """Cut off what is rejected in all rows, and hide what is rejected in some."""
        most = int(counts.max())
        length = self._mask.shape[1] - (fed - most)
        if most < fed:
            self._cache.crop(most - fed)
            self._mask = self._mask[:, :length]
        rejected = torch.arange(most, device=counts.device) >= counts[:, None]
        if bool(rejected.any()):
            self._gaps = True
            self._mask[:, length - most :].masked_fill_(rejected, 0)

    def select(self, rows: Tensor) -> None:
        """Drop the other rows' keys and values."""
        self._mask = self._mask[rows]
        if self._cache is not None:
            self._cache.batch_select_indices(rows)


class Mixture:
    """Two models whose distributions are mixed: alpha p + (1 - alpha) q.

    Args:
        first: q.
        second: p.
        alpha: Share of p, in (0, 1).
    """

    def __init__(self, first: Scorer, second: Scorer, alpha: float) -> None:
        self.parts = (first, second)
        self.shares = (math.log1p(-alpha), math.log(alpha))

    def begin(self, ids: Tensor, mask: Tensor) -> None:
        """Let both read."""
        for part in self.parts:
            part.begin(ids, mask)

    def feed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Log-probabilities of the mixture, float64."""
        found = [
            part.feed(tokens, positions).double().log_softmax(-1) + share
            for part, share in zip(self.parts, self.shares, strict=True)
        ]
        return torch.logaddexp(*found)

    def keep(self, counts: Tensor, fed: int) -> None:
        """Let both forget."""
        for part in self.parts:
            part.keep(counts, fed)

    def select(self, rows: Tensor) -> None:
        """In both."""
        for part in self.parts:
            part.select(rows)
