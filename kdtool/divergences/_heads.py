"""What turns a language model's hidden states into logits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_SCALED_WHERE_TIED = ("umt5", "switch_transformers")
"""Kin of T5 that scale hidden states by their width where the head is tied."""

Piece = tuple[Tensor, Tensor]
"""Inputs [rows, width] and matrix [vocabulary, width]; logits are the sum of the pieces' products."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A low-rank addition to a head's matrix: factor * up @ down (LoRA).

    Attributes:
        down: A [rank, width].
        up: B [vocabulary, rank].
        factor: Its scaling.
        dropout: What its inputs go through; None for nothing.
    """

    down: Tensor
    up: Tensor
    factor: float
    dropout: nn.Module | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """What turns hidden states into logits: cap * tanh(scale * (h W^T + adapters + b) / cap).

    Attributes:
        weight: W [vocabulary, width]; tied to the input embedding or not.
        bias: b [vocabulary], or None.
        scale: Factor of the logits.
        cap: Soft cap, or None.
        adapters: Low-rank additions to W.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    adapters: Sequence[Adapter] = ()

    def pieces(self, hidden: Tensor) -> list[Piece]:
        """The products that make the logits; inputs of adapters carry the gradient of what makes them."""
        found = [(hidden, self.weight)]
        for one in self.adapters:
            given = hidden if one.dropout is None else one.dropout(hidden)
            found.append((functional.linear(given, one.down.to(given.dtype)) * one.factor, one.up))
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocabulary] of hidden states [rows, width], in the format of the head."""
        (_, first), *others = self.pieces(hidden)
        found = functional.linear(hidden, first, self.bias)
        for given, matrix in others:
            found = found + functional.linear(given, matrix)
        found = found * self.scale
        return found if self.cap is None else self.cap * torch.tanh(found / self.cap)

    def cut(self, vocabulary: int) -> "Head":
        """The head of the first `vocabulary` tokens, without the padding that makes heads a round size."""
        if vocabulary >= len(self.weight):
            return self
        bias = None if self.bias is None else self.bias[:vocabulary]
        adapters = [replace(one, up=one.up[:vocabulary]) for one in self.adapters]
        return replace(self, weight=self.weight[:vocabulary], bias=bias, adapters=adapters)


def head_of(model: Any) -> Head:
    """What turns a model's last hidden states into its logits; a head with LoRA as peft wraps it, too."""
    layer, config = model.get_output_embeddings(), model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    if _by_width(config):
        scale *= float(config.d_model) ** -0.5
    cap = getattr(config, "final_logit_softcapping", None)
    plain = getattr(layer, "base_layer", layer)
    return Head(plain.weight, _bias(model, plain), scale, cap, () if plain is layer else _adapters(layer))


def _by_width(config: Any) -> bool:
    """Whether hidden states are multiplied by 1 / sqrt(width) first, as in T5."""
    tied = getattr(config, "model_type", None) in _SCALED_WHERE_TIED and config.tie_word_embeddings
    return bool(getattr(config, "scale_decoder_outputs", tied))


def _bias(model: Any, layer: Any) -> Tensor | None:
    """The layer's bias, or the constant that models like BART add to the logits; None where it is zero."""
    bias: Tensor | None = layer.bias
    constant: Tensor | None = getattr(model, "final_logits_bias", None)
    if bias is None and constant is not None and bool(constant.any()):
        return constant.reshape(-1)
    return bias


def _adapters(layer: Any) -> list[Adapter]:
    """The low-rank additions that a peft layer applies; none where they are switched off or merged."""
    if layer.disable_adapters or layer.merged:
        return []
    return [
        Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], layer.lora_dropout[name])
        for name in layer.active_adapters
        if name in layer.lora_A
    ]
