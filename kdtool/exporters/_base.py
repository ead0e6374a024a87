"""What an exporter gets and gives back."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdtool.errors import UsageProblem
from kdtool.modeling.quantized import QuantizedLinear
from kdtool.models import Loaded
from kdtool.tasks._base import Batch, Task
from kdtool.verify import outputs


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What became of an export.

    Attributes:
        dtype: Number format of the weights written.
        files: Names of the files written.
        parity: `max_abs_diff`, `tolerance`, `passed`, ... of the exported model against the source;
            `why` says in one line what was missed, where that is not the largest difference.
        facts: More for the manifest: inputs, outputs, opset, engine, ...
        graph: The file to set aside as `<name>.failed` when the check is not passed, if there is one.
        use: Lines of the model card that say how to load the result; None for the usual ones.
        scored: True if `kdtool evaluate` takes the result.
    """

    dtype: str
    files: list[str]
    parity: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    graph: str | None = None
    use: list[str] | None = None
    scored: bool = True


TOLERANCE = {"float32": 1e-4, "float16": 2e-2}
"""Largest difference of an output, relative to the largest output (at least 1)."""
INT8_ERROR = 0.25
"""Largest relative error of int8: norm of the differences by norm of the outputs."""
INT8_AGREEMENT = 0.9
"""Least share of units with the same largest logit; judged from `_ENOUGH` units on."""
_ENOUGH = 20


def source_outputs(task: Task, model: nn.Module, probes: Sequence[Batch]) -> list[torch.Tensor]:
    """Logits of a model on each batch, float32 on the CPU."""
    return [outputs(task, model, probe) for probe in probes]


def judge(
    expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor], probes: Sequence[Batch], precision: str
) -> dict[str, Any]:
    """Compare an exported model with its source.

    Args:
        expected: Logits [units, classes] of the source on each batch.
        found: Those of the exported model.
        probes: The batches; their shapes are reported.
        precision: float32, float16 or int8; sets the bound.

    Returns:
        The `parity` of an `ExportReport`.
    """
    pairs = list(zip(expected, found, strict=True))
    largest = max(float((f - e).abs().max()) for e, f in pairs)
    if not all(bool(torch.isfinite(f).all()) for _, f in pairs):
        largest = float("nan")  # max() would hide it behind the other batches
    scale = max(1.0, *(float(e.abs().max()) for e in expected))
    before, after = torch.cat(list(expected)), torch.cat(list(found))
    error = float((after - before).norm() / before.norm().clamp_min(1e-12))
    agreement = float((after.argmax(-1) == before.argmax(-1)).double().mean())
    shapes = [{name: list(value.shape) for name, value in probe.items()} for probe in probes]
    parity: dict[str, Any] = {
        "max_abs_diff": largest,
        "relative_error": error,
        "argmax_agreement": agreement,
        "units": len(before),
        "examples": max(next(iter(probe.values())).shape[0] for probe in probes),
        "shapes": shapes,
    }
    if precision == "int8":
        judged = len(before) >= _ENOUGH
        passed = error <= INT8_ERROR and (agreement >= INT8_AGREEMENT or not judged)
        why = f"relative error {error:.3f}, allowed {INT8_ERROR}"
        if judged:
            why += f"; {100 * agreement:.1f} % of {len(before)} predictions kept, {100 * INT8_AGREEMENT:.0f} % asked"
        return {**parity, "judged_by": "relative_error", "tolerance": INT8_ERROR, "passed": passed, "why": why}
    bound = TOLERANCE[precision] * scale
    return {**parity, "judged_by": "max_abs_diff", "tolerance": bound, "passed": largest <= bound}


def check_weights(loaded: Loaded) -> None:
    """Refuse a model whose quantised maps no graph can hold as they are.

    Raises:
        UsageProblem: they round their inputs, too.
    """
    if any(isinstance(part, QuantizedLinear) and part.dynamic for part in loaded.model.modules()):
        raise UsageProblem(
            f"the int8-dynamic weights of '{loaded.ref}' cannot be exported as a graph",
            why="a kernel of torch rounds their inputs, which other runtimes round otherwise",
            hint="export the model it was made of with --set method.precision=int8, or quantise to scheme int8 or int4",
        )


def graph_inputs(loaded: Loaded, batch: Batch) -> Batch:
    """A batch with all that the processor makes and the model takes.

    kdtool's tasks leave out masks that say nothing; a graph should take the processor's whole output.
    """
    made = set(getattr(loaded.processor, "model_input_names", ()))
    taken = set(inspect.signature(loaded.model.forward).parameters)
    full = dict(batch)
    ids = batch.get("input_ids")
    if ids is not None:
        for name, make in (("attention_mask", torch.ones_like), ("token_type_ids", torch.zeros_like)):
            if name in made and name in taken and name not in full:
                full[name] = make(ids)
    return full


def save_parts(loaded: Loaded, folder: Path) -> None:
    """Write config.json and the processor's files beside a graph."""
    config: Any = loaded.model.config
    config.architectures = [type(loaded.model).__name__]  # names the task to those who load the folder
    config.save_pretrained(folder)
    if loaded.processor is not None:
        loaded.processor.save_pretrained(folder)
