"""The stages of `compress`: one compressor after the other, each with inputs in the numbers of its model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdtool.compressors._base import Context, divergence, renumber
from kdtool.data.examples import Examples
from kdtool.errors import KdtoolError, ModelProblem
from kdtool.models import Loaded
from kdtool.registry import COMPRESSORS
from kdtool.tasks._base import Batch, Task
from kdtool.verify import outputs

_COLLAPSED = 1e-3
"""Outputs have collapsed when they differ among inputs by less than this share of what they did before."""
_UNITS = 2
"""Least number of units among which a spread is judged."""
_HIDDEN = ("new_weights", "dtype", "stages", "ids", "kept")
"""Facts of a model that its record leaves out."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A model between two stages.

    Attributes:
        loaded: The model.
        context: What its next compressor gets.
        probes: Inputs to compare outputs on.
        kept: Of the vocabulary of the first model, the tokens that are left; None for all.
    """

    loaded: Loaded
    context: Context
    probes: Sequence[Batch]
    kept: Tensor | None = None

    def through(self, name: str, values: dict[str, Any]) -> "Standing":
        """After one more stage."""
        made: Loaded = COMPRESSORS.get(name)(self.loaded, COMPRESSORS.build_config(name, values), self.context)
        made.facts["stages"] = [*self.loaded.facts.get("stages", ()), name]
        return self.holding(made)

    def holding(self, made: Loaded) -> "Standing":
        """With another model, which may have renumbered its tokens."""
        ids, kept = made.facts.get("ids"), self.kept
        if ids is None:
            return replace(self, loaded=made)
        batches = self.context.batches
        batches = None if batches is None else [renumber(batch, ids) for batch in batches]
        kept = made.facts["kept"] if kept is None else kept[made.facts["kept"]]
        context = replace(self.context, batches=batches, rows=_renumbered(self.context, ids))
        return Standing(made, context, [renumber(probe, ids) for probe in self.probes], kept)

    def change(self, expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
        """Divergence of outputs from those of the first model, on the tokens that both know."""
        return divergence([_shared(e, f, self.kept) for e, f in zip(expected, found, strict=True)], found)


def _renumbered(context: Context, ids: Tensor) -> Examples | None:
    """Training rows in the numbers of another vocabulary; None for language models, whose rows hold more."""
    rows = context.rows
    if rows is None or not context.task.classifies:
        return None
    columns = {**rows.columns, "input_ids": [ids.numpy()[np.asarray(row)] for row in rows.columns["input_ids"]]}
    return Examples(columns, rows.lengths)


def _shared(old: Tensor, new: Tensor, kept: Tensor | None) -> Tensor:
    """Logits over a vocabulary, without those of tokens that are gone."""
    return old if kept is None or old.shape[-1] == new.shape[-1] else old[:, kept]


def record(name: str, before: Standing, after: Standing) -> dict[str, Any]:
    """What a report says of a stage, after its outputs were held against those before it.

    Returns:
        `name`, `parameters`, `relative_error` (norm of the differences by norm of the outputs), `agreement`
        (share of units with the same largest logit) and `made` (facts of the compressor).

    Raises:
        KdtoolError: the outputs are not finite, or the same whatever the input.
    """
    task = before.context.task
    pairs = _comparable(before, after)
    old = _all(task, before.loaded, [probe for probe, _ in pairs])
    try:
        new = _all(task, after.loaded, [probe for _, probe in pairs])
    except RuntimeError as error:
        raise ModelProblem(
            f"the model does not compute with the shapes of the stage '{name}'", why=str(error).split("\n", 1)[0]
        ) from None
    old = _shared(old, new, after.loaded.facts.get("kept"))
    why = None
    if not torch.isfinite(new).all():
        why = "its outputs are not finite"
    elif len(new) >= _UNITS and float(new.std(0).norm()) < _COLLAPSED * float(old.std(0).norm()):
        why = "it gives the same outputs whatever the input"
    if why is not None:
        raise KdtoolError(f"the model collapsed in the stage '{name}'", why=why, hint="keep more of it")
    return {
        "name": name,
        "parameters": after.loaded.parameters,
        "relative_error": float((new - old).norm() / old.norm().clamp_min(1e-12)),
        "agreement": float((new.argmax(-1) == old.argmax(-1)).double().mean()),
        "made": {key: value for key, value in after.loaded.facts.items() if key not in _HIDDEN},
    }


def _comparable(before: Standing, after: Standing) -> list[tuple[Batch, Batch]]:
    """Probes for both models; with another vocabulary those rows all of whose tokens stay, if there are any."""
    pairs = list(zip(before.probes, after.probes, strict=True))
    kept = after.loaded.facts.get("kept")
    if kept is None or before.probes is after.probes:
        return pairs
    chosen = []
    for old, new in pairs:
        rows = torch.isin(old["input_ids"], kept).all(1)
        if rows.any():
            chosen.append(({k: v[rows] for k, v in old.items()}, {k: v[rows] for k, v in new.items()}))
    return chosen or pairs


def _all(task: Task, loaded: Loaded, probes: Sequence[Batch]) -> Tensor:
    return torch.cat([outputs(task, loaded.model, probe) for probe in probes])
