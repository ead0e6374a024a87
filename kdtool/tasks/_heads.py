"""Language models as a body and a head, so that logits need not be held as a whole."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kdtool.divergences import head_of

_FEW = 4


def body_of(model: Any) -> Any:
    """What gives the last hidden states; below the wrapper of peft where there is one."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return plain.base_model


def decoded(model: Any, ids: Tensor, mask: Tensor | None, seen: Tensor, seen_mask: Tensor | None) -> Tensor:
    """Last hidden states [rows, length, width] of a decoder beside an encoder.

    Args:
        model: The whole model.
        ids: What the decoder reads [rows, length].
        mask: 1 for tokens, 0 for padding; None for no padding that a token could see.
        seen: Last hidden states [rows, n, width] of the encoder.
        seen_mask: 1 for its tokens, 0 for padding; None for no padding.
    """
    out = model.get_decoder()(
        input_ids=ids,
        attention_mask=mask,
        encoder_hidden_states=seen,
        encoder_attention_mask=seen_mask,
        use_cache=False,
    )
    found: Tensor = out.last_hidden_state
    return found


@torch.no_grad()
def has_plain_head(model: Any) -> bool:
    """Whether head and last hidden states give a model's logits, tried on a few tokens."""
    layer = getattr(model, "get_output_embeddings", lambda: None)()
    matrix = getattr(getattr(layer, "base_layer", layer), "weight", None)
    if not isinstance(matrix, Tensor) or isinstance(matrix, DTensor) or matrix.ndim != 2:
        return False
    ids = (torch.arange(_FEW, device=matrix.device) % len(matrix))[None]
    training = model.training
    model.eval()
    try:
        if model.config.is_encoder_decoder:
            hidden = decoded(model, ids, None, model.get_encoder()(input_ids=ids).last_hidden_state, None)
            expected = model(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits
        else:
            hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state
            expected = model(input_ids=ids, use_cache=False).logits
        found = head_of(model).logits(hidden)
    finally:
        model.train(training)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-2, atol=1e-2)
