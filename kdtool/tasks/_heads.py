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
        hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        found, expected = head_of(model).logits(hidden), model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(training)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-2, atol=1e-2)
