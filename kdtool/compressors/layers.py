"""Keep some of the layers: evenly spaced ones, or those whose loss changes the outputs least."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kdtool.compressors._base import Context, carried, layers_of, run_over
from kdtool.derive import from_layers
from kdtool.errors import UsageProblem
from kdtool.models import Loaded

paper = "Fan, Grave, Joulin: Reducing Transformer Depth on Demand with Structured Dropout, 2019, arXiv:1909.11556"


@dataclass(frozen=True)
class Config:
    """Settings."""

    keep: float = 0.5
    """Share of the layers to keep, above 0 and at most 1; at least one stays."""
    layers: str | None = None
    """The layers themselves: a number of evenly spaced ones, or a list such as 0,3,5; wins over keep."""
    by: Literal["even", "change"] = "even"
    """Evenly spaced, or drop one after the other the layer without which the outputs on the data change least."""


def _divergence(before: list[Tensor], after: list[Tensor]) -> float:
    """Mean Kullback-Leibler divergence of the outputs from those of the whole model."""
    pairs = [(a.log_softmax(-1), b.log_softmax(-1)) for a, b in zip(before, after, strict=True)]
    total = sum(float((p.exp() * (p - q)).sum()) for p, q in pairs)
    return total / sum(len(p) for p, _ in pairs)


def _least_missed(loaded: Loaded, depth: int, count: int, context: Context) -> list[int]:
    """Greedy choice of the layers to keep."""
    expected = run_over(loaded.model, context)
    kept = list(range(depth))
    while len(kept) > count:
        changes = {}
        for candidate in kept:
            rest = [i for i in kept if i != candidate]
            cut = from_layers(loaded, f"layers:{','.join(map(str, rest))},")
            changes[candidate] = _divergence(expected, run_over(cut.model, context))
        dropped = min(changes, key=lambda i: (changes[i], i))
        context.run.reporter.info(f"without layer {dropped} the outputs change by {changes[dropped]:.4g} nats")
        kept.remove(dropped)
    return kept


def compress(loaded: Loaded, config: Config, context: Context) -> Loaded:
    """The model with fewer layers.

    Raises:
        UsageProblem: such layers are not there, or data is needed.
        ModelProblem: the architecture has no single stack of layers.
    """
    depth = len(layers_of(loaded)[1])
    if not 0.0 < config.keep <= 1.0:
        raise UsageProblem(f"layers: keep={config.keep:g} is no share of the layers", hint="above 0 and at most 1")
    count = max(1, round(config.keep * depth))
    if config.layers is not None:
        spec = f"layers:{config.layers}"
    elif config.by == "change":
        if context.batches is None:
            raise UsageProblem("layers: by=change looks at outputs on data", hint="add --data DATA")
        with torch.random.fork_rng():
            spec = f"layers:{','.join(map(str, _least_missed(loaded, depth, count, context)))},"
    else:
        spec = f"layers:{count}"
    made = from_layers(loaded, spec)
    made.ref, made.facts = loaded.ref, carried(loaded, layers=made.facts["layers"])
    return made
