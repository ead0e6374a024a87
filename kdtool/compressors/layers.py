"""Keep some of the layers: evenly spaced ones, or those that the outputs or the loss on data miss most."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from kdtool.compressors._base import Context, Made, divergence, in_memory, layers_of, loss_over, run_over
from kdtool.derive import from_layers, keep_layers
from kdtool.errors import UsageProblem
from kdtool.lazy import State
from kdtool.models import Loaded

paper = "Fan, Grave, Joulin: Reducing Transformer Depth on Demand with Structured Dropout, 2019, arXiv:1909.11556"
streams = True
dials = {"keep": 0.01}


@dataclass(frozen=True)
class Config:
    """Settings."""

    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the layers to keep, above 0 and at most 1; at least one stays."""
    layers: str | None = None
    """The layers themselves: a number of evenly spaced ones, or a list such as 0,3,5; wins over keep."""
    choose: Literal["even", "change", "loss"] = "even"
    """Evenly spaced, or drop one after the other the layer without which outputs change or loss grows least."""


def _least_missed(loaded: Loaded, depth: int, count: int, config: Config, context: Context) -> list[int]:
    """Greedy choice of the layers to keep."""
    expected = run_over(loaded.model, context) if config.choose == "change" else []

    def cost(cut: Loaded) -> float:
        if config.choose == "change":
            return divergence(expected, run_over(cut.model, context))
        loss = loss_over(cut.model, context)
        if loss is None:
            raise UsageProblem("layers: choose=loss needs labels", hint="choose=change looks at outputs alone")
        return loss

    word = "the outputs change by" if config.choose == "change" else "the loss is"
    kept = list(range(depth))
    while len(kept) > count:
        costs = {}
        for candidate in kept:
            rest = [i for i in kept if i != candidate]
            costs[candidate] = cost(from_layers(loaded, f"layers:{','.join(map(str, rest))},"))
        dropped = min(costs, key=lambda i: (costs[i], i))
        context.run.reporter.info(f"without layer {dropped} {word} {costs[dropped]:.4g} nats")
        kept.remove(dropped)
    return kept


def _spec(loaded: Loaded, config: Config, context: Context) -> str:
    """Which layers stay, as `layers:N` or `layers:0,3,5`."""
    depth = len(layers_of(loaded)[1])
    count = max(1, round(config.keep * depth))
    if config.layers is not None:
        return f"layers:{config.layers}"
    if config.choose == "even":
        return f"layers:{count}"
    if context.batches is None:
        raise UsageProblem(f"layers: choose={config.choose} looks at data", hint="add --data DATA")
    if next(loaded.model.parameters()).is_meta:
        raise UsageProblem(
            f"layers: choose={config.choose} runs the model, which is not held in memory",
            hint="choose=even, or --set method.layers=0,3,5",
        )
    with torch.random.fork_rng():
        return f"layers:{','.join(map(str, _least_missed(loaded, depth, count, config, context)))},"


def stream(loaded: Loaded, state: State, config: Config, context: Context) -> Made:
    """The model with fewer layers, weight by weight.

    Raises:
        UsageProblem: such layers are not there, or data is needed.
        ModelProblem: the architecture has no single stack of layers.
    """
    cut, names, chosen = keep_layers(loaded.model, _spec(loaded, config, context))
    # tied weights may be stored once, and so under one name
    return Made(cut, {new: state[old] for old, new in names.items() if old in state}, {"layers": chosen})


def compress(loaded: Loaded, config: Config, context: Context) -> Loaded:
    """The model with fewer layers; see `stream`."""
    return in_memory(stream, loaded, config, context)
