"""The two layers for which KDEformer states speed-ups: multiply-adds, error and time on this machine.

Usage: python docs/evidence/paper_shapes.py [BATCH]

The paper's ratios are of multiply-adds: 18.31 and 4.15. They are counted from the shapes, and while the operator runs.
Times are one thread's, of BATCH (default 4) sequences, operator and exact attention in turn: against torch's fused
kernel and against attention that forms its logits. Inputs are standard normal, queries times 0.5; on such inputs
errors are not those of a trained model, which docs/evidence/kde-attention.md has.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kdtool.attention._base import Call
from kdtool.patching.choose import speed, worst_head
from kdtool.patching.cost import BIGGAN, T2T, Shape, exact_cost, kdeformer_cost, multiply_adds
from kdtool.patching.interface import Layer

SHAPES = {"T2T-ViT": (T2T, 32, 98), "BigGAN": (BIGGAN, 64, 128)}
"""Name to shape, bucket and samples of the paper."""
_TURNS = 5


def naive(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention that forms all logits, as the paper's baseline does."""
    return torch.softmax(q @ k.mT * scale, -1) @ v


def seconds(run: Callable[[], object]) -> float:
    """Least process time of some turns."""
    found = []
    for _ in range(_TURNS):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def rows(name: str, shape: Shape, bucket: int, samples: int, batch: int) -> list[str]:
    """A row of the table for each operator."""
    draw = torch.Generator().manual_seed(0)
    sizes = ((shape.queries, shape.width), (shape.keys, shape.width), (shape.keys, shape.wide))
    q, k, v = (torch.randn(batch, 1, *size, generator=draw) for size in sizes)
    q, call = q * 0.5, Call(shape.width**-0.5)
    truth = functional.scaled_dot_product_attention(q, k, v)
    formula = exact_cost(shape) / kdeformer_cost(shape, bucket, samples)
    found = []
    settings = {"kdeformer": {"bucket": bucket, "samples": samples}, "cluster": {"leaf": 32, "near": 0}}
    for operator, chosen in settings.items():
        layer = Layer(name, operator, chosen)

        def run(layer: Layer = layer) -> Tensor:
            return layer.attend(q, k, v, call)

        counted = batch * exact_cost(shape) / shape.batch / multiply_adds(run)
        slow = seconds(lambda: naive(q, k, v, call.scale)) / seconds(run)
        stated = f"{formula:.2f}" if operator == "kdeformer" else "-"
        error = worst_head(run(), truth)
        times = f"{speed(layer, q, k, v, call):.2f}x | {slow:.2f}x"
        how = ", ".join(f"{key} {value}" for key, value in layer.settings.items())
        found.append(f"| {name} | {operator} ({how}) | {stated} | {counted:.2f} | {times} | {error:.2f} |")
    return found


def main(batch: int = 4) -> None:
    """Print the table."""
    print("| layer | operator | multiply-adds, formula | counted | time: fused | time: naive | error |")
    print("|---|---|---|---|---|---|---|")
    for name, (shape, bucket, samples) in SHAPES.items():
        print("\n".join(rows(name, shape, bucket, samples, batch)), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:2]))
