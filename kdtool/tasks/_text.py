"""What text tasks share: lengths, padding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdtool.errors import ConfigProblem
from kdtool.models import Loaded

_UNBOUNDED = 1_000_000  # tokenizers without a limit state about 1e30
_DEFAULT_LONGEST = 512


def longest(loaded: Loaded, wanted: int | None, default: int = _DEFAULT_LONGEST) -> int:
    """Longest sequence in tokens that a model takes, or the shorter one asked for.

    Raises:
        ConfigProblem: more was asked for than the model has positions.
    """
    limits = []
    if loaded.processor.model_max_length < _UNBOUNDED:
        limits.append(int(loaded.processor.model_max_length))
    own, _ = positions(loaded)
    if own is not None:
        limits.append(own)
    bound = min(limits, default=default)
    if wanted is not None and limits and wanted > bound:
        raise ConfigProblem(f"data.max_length={wanted}: '{loaded.ref}' takes at most {bound} tokens")
    return wanted or min(bound, default)


def positions(loaded: Loaded) -> tuple[int | None, bool]:
    """Positions that a model was made for, None if it names none; and whether it can go on beyond them.

    Rotary positions are computed for any place, others are looked up in a table.
    """
    config: Any = loaded.model.config
    config = getattr(config, "backbone_config", None) or config
    named = getattr(config, "max_position_embeddings", None)
    if not named or named < 0:
        return None, True
    # RoBERTa-like models lose the positions up to the padding id
    padded = config.model_type in {"roberta", "xlm-roberta", "camembert", "mpnet", "longformer"}
    return int(named) - (2 if padded else 0), bool(getattr(config, "rope_parameters", None))


def padding_id(tokenizer: Any) -> int:
    """The padding token's id; masked positions never count, so any id will do where there is none."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    return 0


def pad(rows: Sequence[np.ndarray], value: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Pad rows of ids to one matrix, on the right unless `left`.

    Returns:
        Ids and attention mask, both [batch, longest] int64.
    """
    lengths = np.array([len(row) for row in rows])
    places = np.arange(lengths.max())
    mask = (places[::-1] if left else places) < lengths[:, None]
    ids = np.full(mask.shape, value, dtype=np.int64)
    ids[mask] = np.concatenate(rows)
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))
