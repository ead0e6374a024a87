"""Multiply-adds of attention: counted from shapes as the paper's demonstration does, and counted while it runs.

Counted are the products of matrices, as the paper's speed-ups do; exponentials, sorting and memory traffic
are not, so these ratios say nothing of time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_POWER_STEPS = 20


@dataclass(frozen=True, slots=True)
class Shape:
    """One attention operator.

    Attributes:
        queries: nq.
        keys: n.
        width: d, features of a key.
        wide: dv, features of a value.
        batch: Sequences times heads.
    """

    queries: int
    keys: int
    width: int
    wide: int
    batch: int = 1


def exact_cost(shape: Shape) -> int:
    """Multiply-adds of exact attention: logits n nq d, and weighted values n nq dv."""
    return shape.batch * shape.queries * shape.keys * (shape.width + shape.wide)


def kdeformer_cost(shape: Shape, bucket: int, samples: int, projections: int = 7) -> int:
    """Multiply-adds of KDEformer's practical algorithm, its values widened by a column of ones for the denominator.

    Hashing of queries and keys; each query with its block of keys and with the samples; the second moment
    of the values, for the sampling probabilities, and the power iteration on it.

    Args:
        shape: The operator.
        bucket: Keys in a block.
        samples: Keys drawn for the rest.
        projections: Hyperplanes of the hash.
    """
    values = shape.wide + 1
    hashing = (shape.queries + shape.keys) * shape.width * projections
    attending = shape.queries * (bucket + samples) * (shape.width + values)
    moment = shape.keys * values**2 + _POWER_STEPS * values**2
    return shape.batch * (hashing + attending + moment)


T2T = Shape(queries=3136, keys=3136, width=64, wide=64, batch=128)
"""The first token-to-token layer of T2T-ViT, as the paper measures it; with bucket 32 and 98 samples."""

BIGGAN = Shape(queries=4096, keys=1024, width=64, wide=256, batch=8)
"""The attention layer of BigGAN-deep-512, as the paper measures it; with bucket 64 and 128 samples."""


def multiply_adds(run: Callable[[], object]) -> int:
    """Multiply-adds of all products of matrices while something runs, such as an operator on real inputs.

    Causal attention within the kernel counts the half that it computes. Backward passes are not counted.

    Args:
        run: What to run.
    """

    def attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *rest: Any, **_more: Any) -> int:
        causal = bool(rest[1]) if len(rest) > 1 else False
        batch, heads, rows, width = q
        products = batch * heads * rows * k[2] * (width + v[3])
        return products if causal else 2 * products  # the counter counts an addition and a multiplication each

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={kernel: attention}) as counter:
        run()
    return int(counter.get_total_flops()) // 2
