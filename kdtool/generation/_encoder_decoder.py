"""Decoders that write from what an encoder has read."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput


class Source:
    """What encoders read before decoders write; each encoder that does not train reads it once.

    Args:
        ids: Token ids [rows, n], padded on the right, since some encoders count positions from the first token.
        mask: 1 for tokens, 0 for padding.
    """

    def __init__(self, ids: Tensor, mask: Tensor) -> None:
        self.ids = ids
        self.mask = mask
        self._read: dict[int, tuple[nn.Module, ModelOutput]] = {}

    def read(self, model: nn.Module) -> ModelOutput:
        """What a model's encoder makes of it, in the form that the model takes.

        It is kept where the model is frozen; one that trains reads in its present mode, with gradient if wanted.
        """
        if id(model) in self._read:
            return self._read[id(model)][1]
        anything: Any = model
        found: ModelOutput = anything.get_encoder()(input_ids=self.ids, attention_mask=self.mask)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            self._read[id(model)] = model, found
        return found

    def states(self, model: nn.Module) -> Tensor:
        """Last hidden states [rows, n, width] of a model's encoder."""
        found: Tensor = self.read(model).last_hidden_state
        return found


def in_step(model: nn.Module) -> bool:
    """Whether all rows of a decoder must be equally long, because it counts positions from the first of its cache.

    Causal models are told the positions, and those with relative ones (T5 and its kin) see the distances alone.
    """
    config: Any = model.config
    return bool(config.is_encoder_decoder) and not hasattr(config, "relative_attention_num_buckets")


class EncoderDecoder:
    """A model of transformers whose decoder writes from what its encoder has read; see `Scorer`.

    The prompts that it is given are what its decoder reads first, at least the token that every text begins with. The
    cache is kept such that the last tokens of all rows stand side by side, so their distances are right.

    Args:
        model: The model; the caller puts it into eval mode.
        source: What the encoder reads.
        vocabulary: Logits are cut to this many tokens, where heads are padded; None for all.
    """

    def __init__(self, model: nn.Module, source: Source, vocabulary: int | None = None) -> None:
        self.model: Any = model
        self.source = source
        self.vocabulary = vocabulary
        self._cache: Any = None
        self._seen: Any = None
        self._seen_mask = source.mask
        self._mask = torch.zeros(0, 0, dtype=torch.long)
        self._gaps = False  # whether the mask hides anything

    def begin(self, ids: Tensor, mask: Tensor) -> None:
        """Let the encoder read the source, and the decoder all but the last token of what it is given."""
        self._cache = None
        self._remember(mask[:, :-1])
        self._seen, self._seen_mask = self.source.read(self.model), self.source.mask
        if ids.shape[1] > 1:
            self._cache = self._read(ids[:, :-1]).past_key_values

    def feed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Read on; positions are those that the tokens have in the cache."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(tokens.shape)], 1)
        out = self._read(tokens)
        self._cache = out.past_key_values
        logits: Tensor = out.logits
        return logits if self.vocabulary is None else logits[..., : self.vocabulary]

    def _read(self, tokens: Tensor) -> Any:
        return self.model(
            encoder_outputs=self._seen,
            attention_mask=self._seen_mask,
            decoder_input_ids=tokens,
            decoder_attention_mask=self._mask if self._gaps else None,
            past_key_values=self._cache,
            use_cache=True,
        )

    def _remember(self, mask: Tensor) -> None:
        self._mask, self._gaps = mask, bool((mask == 0).any())

    def keep(self, counts: Tensor, fed: int) -> None:
        """Cut off what is rejected in all rows, and move rows to the right in which more is."""
        most = int(counts.max())
        if most < fed:
            self._cache.crop(most - fed)
            self._mask = self._mask[:, : most - fed]
        if bool((counts < most).any()):
            self._move(most - counts)

    def _move(self, by: Tensor) -> None:
        """Move what is remembered of each row to the right by so many places [rows], over what was rejected."""
        places = torch.arange(self._mask.shape[1], device=by.device) - by[:, None]
        mask = self._mask.gather(1, places.clamp_min(0)).masked_fill(places < 0, 0)
        empty = int((mask == 0).sum(1).min())  # on the left, in all rows
        places = places[:, empty:].clamp_min(0)
        self._remember(mask[:, empty:])
        for layer in self._cache.self_attention_cache.layers:
            chosen = places[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys, layer.values = layer.keys.gather(2, chosen), layer.values.gather(2, chosen)

    def select(self, rows: Tensor) -> None:
        """Drop what belongs to the other rows."""
        self._remember(self._mask[rows])
        self._seen = type(self._seen)(last_hidden_state=self._seen.last_hidden_state[rows])
        self._seen_mask = self._seen_mask[rows]
        if self._cache is not None:
            self._cache.batch_select_indices(rows)
