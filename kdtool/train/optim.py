"""Optimisers and their parameter groups."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from kdtool.sections import TrainSection


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], lr: float, head_lr: float, decay: float, is_head: Callable[[str], bool]
) -> list[dict[str, object]]:
    """Group parameters by learning rate and decay.

    Biases, norms and other vectors are never decayed.

    Args:
        named: Trainable parameters with their names.
        lr: Peak rate of the body.
        head_lr: Peak rate of what `is_head` names.
        decay: Decoupled weight decay of matrices.
        is_head: Decides by name.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        key = (head_lr if is_head(name) else lr, decay if parameter.ndim > 1 else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [{"params": p, "lr": rate, "peak_lr": rate, "weight_decay": wd} for (rate, wd), p in groups.items()]


def build_optimizer(groups: list[dict[str, object]], config: TrainSection, device: str) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum 0.9; fused kernels where the device has them."""
    sharded = any(isinstance(p, DTensor) for group in groups for p in group["params"])  # type: ignore[attr-defined]
    fused = device.startswith(("cpu", "cuda")) and not sharded
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True, fused=fused)
    return torch.optim.AdamW(groups, fused=fused)
