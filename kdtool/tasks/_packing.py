"""Several examples in one row, none of which sees another.

Positions start anew at each example, by which transformers tells examples apart and makes attention
block-diagonal. A batch keeps its examples and their order, so packing changes the time of a step, not
its result: rows that do not share a line are padded to the longest instead.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdtool.data.examples import Examples
from kdtool.tasks._base import Batch

POSITIONS = "position_ids"
"""Column and batch key: place of each token in its example, from 0. Examples that have it are packed."""

_PROBE = (5, 7)
"""Tokens of the two examples that a model is tried on."""

_CLOSE = 1e-3


def packable(rows: Examples) -> Examples:
    """Rows that are to be packed: each token knows its place."""
    places = [np.arange(len(ids), dtype=np.int64) for ids in rows.columns["input_ids"]]
    return Examples({**rows.columns, POSITIONS: places}, rows.lengths)


def joined(items: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[dict[str, np.ndarray]]:
    """Examples laid end to end in order, in rows no longer than the longest of them.

    Args:
        items: Examples, with their positions.
        keys: Which arrays [tokens] to join.
    """
    room = max(len(item[POSITIONS]) for item in items)
    groups: list[list[Mapping[str, Any]]] = []
    left = 0
    for item in items:
        if len(item[POSITIONS]) > left:
            groups.append([])
            left = room
        groups[-1].append(item)
        left -= len(item[POSITIONS])
    return [{key: np.concatenate([item[key] for item in group]) for key in keys} for group in groups]


def padded_positions(positions: Tensor, mask: Tensor) -> Tensor:
    """Positions [rows, n] whose padding, where `mask` is 0, is an example of its own."""
    places = torch.arange(mask.shape[1], device=mask.device) - mask.sum(1, keepdim=True)
    return torch.where(mask == 0, places, positions)


def examples_of(batch: Batch) -> Tensor:
    """Number of the example that each token belongs to, [rows, n], counted through the batch; -1 for padding."""
    starts = (batch[POSITIONS] == 0) & (batch["attention_mask"] != 0)
    numbers = starts.flatten().cumsum(0).view_as(starts) - 1
    return numbers.masked_fill(batch["attention_mask"] == 0, -1)


@torch.no_grad()
def keeps_apart(model: nn.Module) -> bool:
    """Whether a causal language model keeps packed examples apart: tried on two short ones.

    The second must have the logits that it has alone, and the very same ones behind another first.
    """
    anything: Any = model
    training, device = model.training, next(model.parameters()).device
    size = int(anything.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    first, other, second = (
        torch.randint(size, (1, length), generator=generator).to(device) for length in (_PROBE[0], _PROBE[0], _PROBE[1])
    )
    places = torch.cat([torch.arange(length) for length in _PROBE])[None].to(device)
    model.eval()
    try:
        behind = [
            anything(input_ids=torch.cat([start, second], 1), position_ids=places, use_cache=False).logits
            for start in (first, other)
        ]
        alone = anything(input_ids=second, use_cache=False).logits
    except (TypeError, ValueError, RuntimeError):
        return False  # it takes no positions
    finally:
        model.train(training)
    one, two = (logits[:, _PROBE[0] :] for logits in behind)
    bound = _CLOSE * float(alone.abs().max())
    return torch.equal(one, two) and float((one - alone).abs().max()) <= bound
