"""Everything a resumed run needs besides the weights: optimiser, random generators."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of all generators, as tensors and JSON."""
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"rng.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, cached = random.getstate()
    state = {
        "numpy": [kind, [int(key) for key in keys], position, has_gauss, gauss],
        "python": [version, list(internal), cached],
    }
    return tensors, state


def restore_generators(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Put all generators back where `generators` found them."""
    torch.set_rng_state(tensors["rng.torch"])
    cuda = [tensors[key] for key in sorted(tensors) if key.startswith("rng.cuda.")]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, cached = state["python"]
    random.setstate((version, tuple(internal), cached))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's per-parameter state under flat names."""
    flat = {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                flat[f"optimizer.{index}.{key}"] = value
    return flat


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the per-parameter state back; groups are rebuilt from the configuration."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            owner = parameters[int(index)]
            if isinstance(owner, DTensor) and value.shape == owner.shape:
                value = distribute_tensor(value.to(owner.device), owner.device_mesh, owner.placements)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
