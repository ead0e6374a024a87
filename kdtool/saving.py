"""Saving a model with its processor, in the number format it should have."""

from pathlib import Path
from typing import Any

import torch

from kdtool.models import Loaded
from kdtool.patching.saving import write_state
from kdtool.sections import OutputSection

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def stored_dtype(loaded: Loaded, wanted: str) -> str:
    """The number format to save in: the one asked for, or the one the model came in."""
    if wanted != "keep":
        return wanted
    given = str(loaded.facts.get("dtype") or "float32").removeprefix("torch.")
    return given if given in _DTYPES else "float32"


def stored_bytes(loaded: Loaded, wanted: str) -> int:
    """Size that the weights of a model will have on disk; shared ones are stored once."""
    each = _DTYPES[stored_dtype(loaded, wanted)].itemsize
    tensors = {(t.data_ptr(), t.shape): t for t in loaded.model.state_dict().values()}
    return sum(t.numel() * (each if t.is_floating_point() else t.element_size()) for t in tensors.values())


def save_model(loaded: Loaded, folder: Path, output: OutputSection) -> None:
    """Write weights, configuration and processor files into a fresh folder.

    The model in memory is rounded to the stored format and kept in float32, so that it gives the
    outputs that the saved one will give.
    """
    name = stored_dtype(loaded, output.dtype)
    model: Any = loaded.model.to("cpu")
    # buffers that are not saved, such as rotary frequencies, are made anew on loading: never rounded
    persistent = set(model.state_dict())
    kept = {key: buffer.clone() for key, buffer in model.named_buffers() if key not in persistent}
    model.to(_DTYPES[name])
    model.save_pretrained(folder, max_shard_size=output.max_shard_size)
    write_state(model, folder)
    model.float().eval()
    for key, buffer in kept.items():
        owner, _, leaf = key.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer)
    if loaded.processor is not None:
        loaded.processor.save_pretrained(folder)
    loaded.facts["dtype"] = name
