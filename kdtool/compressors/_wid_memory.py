"""What training compactors holds in memory, from shapes alone."""

from typing import Any

from torch import nn

from kdtool.compressors._wid_anatomy import Anatomy
from kdtool.compressors._wid_merge import compacted

_STATE = 16
"""Bytes for each trained number: itself, its gradient and two moments."""
_NORM = 4
"""Numbers that a norm over kept dimensions keeps for its backward pass, for each token and unit of width."""


def _maps(model: nn.Module, anatomy: Anatomy, tokens: int) -> int:
    """Numbers that maps between compactors keep besides what maps alone do; see `CompactedLinear.forward`."""
    kept = 0
    for site in anatomy.sites:
        linear: Any = model.get_submodule(site.path)
        high, wide = linear.weight.shape
        inner, outer = site.inner is not None, site.outer is not None
        apart = inner * wide**2 + outer * high**2
        once = inner * wide**2 * high + outer * high**2 * wide
        kept += (inner + outer) * high * wide if tokens * apart > once else tokens * (inner * wide + outer * high)
    return kept


def memory(model: Any, anatomy: Anatomy, tokens: int) -> dict[str, int]:
    """Bytes by what they are for, in float32; activations are those that compactors add to the model's own.

    Args:
        model: The model, whose weights need not be there (device `meta`).
        anatomy: Of it.
        tokens: Of a batch.
    """
    own = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in compacted(model, anatomy).parameters())
    if "mlm" in anatomy.sizes and getattr(model.config, "tie_word_embeddings", False):
        decoder = model.get_output_embeddings().weight.numel()  # gets weights of its own
        own, trained = own + decoder, trained + decoder
    return {
        "copy of the model": 4 * own,
        "weights and compactors, gradients, optimiser": _STATE * trained,
        "activations": 4 * (_maps(model, anatomy, tokens) + _NORM * tokens * anatomy.hidden * len(anatomy.norms)),
    }
