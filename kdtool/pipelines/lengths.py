"""Time and peak memory of models at given sequence lengths, on real text joined and cut to them."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from kdtool import patching
from kdtool.data.examples import Examples
from kdtool.errors import UsageProblem
from kdtool.models import Loaded
from kdtool.proof import Proof
from kdtool.run import Run
from kdtool.runtime_onnx import OnnxModel
from kdtool.sections import RunConfig
from kdtool.tasks._base import TEACHER_PREFIX, Batch, Task, to_device
from kdtool.tasks._text import positions
from kdtool.verify import latency, outputs

_PATIENCE = 20.0
"""Seconds after which no further pass at a length is timed: long passes vary less."""


def check(task: Task, models: Sequence[Loaded], lengths: Sequence[int]) -> list[str]:
    """Refuse lengths that a model cannot read, before any work.

    Args:
        task: The task.
        models: The models to be measured.
        lengths: Lengths in tokens; none asks for nothing.

    Returns:
        What a reader should know of lengths that a model can read, though it was not made for them.

    Raises:
        UsageProblem: the inputs are no text, or the positions of a model end earlier.
    """
    if not lengths:
        return []
    if "text" not in task.columns:
        raise UsageProblem(
            f"--lengths applies to models of text, not to {task.name}", why="other inputs are not counted in tokens"
        )
    notes = []
    longest = max(lengths)
    for loaded in models:
        bound, beyond = positions(loaded)
        if bound is None or longest <= bound:
            continue
        if not beyond:
            raise UsageProblem(
                f"--lengths {longest}: '{loaded.ref}' takes at most {bound} tokens",
                why="its positions end there",
                hint=f"lengths up to {bound}, or a model with more positions",
            )
        notes.append(f"`{loaded.ref}` was made for {bound} positions: beyond them its outputs mean little.")
    return notes


def measure(
    task: Task, student: Loaded, teacher: Loaded | None, data: Examples, config: RunConfig, run: Run, proof: Proof
) -> dict[int, int]:
    """Time one sequence of each length in `eval.lengths`, models in turn, and find the memory of a pass.

    Args:
        task: The task.
        student: The model.
        teacher: The model beside it.
        data: Encoded test rows.
        config: `eval.lengths` holds the lengths, `eval.latency_repeats` the number of timed passes.
        run: Context.
        proof: Its sides get `lengths`.

    Returns:
        Length to the number of tokens that come from the data; the rest is drawn from them.
    """
    lengths = config.eval.lengths
    if not lengths:
        return {}
    run.reporter.info(f"measuring time and memory at {', '.join(map(str, lengths))} tokens")
    sides = {"student": (student, proof.student, "")}
    if teacher is not None and proof.teacher is not None:
        own = f"{TEACHER_PREFIX}0.input_ids" in data.columns
        sides["teacher"] = (teacher, proof.teacher, f"{TEACHER_PREFIX}0." if own else "")
    models = {name: loaded.model for name, (loaded, _, _) in sides.items()}
    real: dict[int, int] = {}
    views: dict[str, dict[int, Batch]] = {name: {} for name in sides}
    for name, (_, _, prefix) in sides.items():
        for length in lengths:
            batch, count = sequence(task, data, length, run.seed, prefix)
            views[name][length] = to_device(batch, run.device)
            real[length] = min(count, real.get(length, count))
    timed = latency(task, models, views, config.eval.latency_repeats, run.device, _PATIENCE)
    for name, (loaded, side, _) in sides.items():
        for length in lengths:
            found: dict[str, float | None] = dict(timed[name][length])
            run_once = _pass(task, loaded.model, views[name][length])
            found["peak_bytes"] = peak_bytes(loaded.model, run_once, run.device)
            if patching.layers_of(loaded.model):
                with patching.counting() as count_of:
                    run_once()
                found |= {"approximate": count_of.approximate, "calls": count_of.total}
            side.lengths[length] = found
    return real


def _pass(task: Task, model: nn.Module, batch: Batch) -> Callable[[], object]:
    return lambda: outputs(task, model, batch)


def sequence(task: Task, data: Examples, length: int, seed: int, prefix: str = "") -> tuple[Batch, int]:
    """One sequence of a length: rows joined and cut; what they lack is drawn from their own ids.

    Args:
        task: The task.
        data: Encoded rows with `input_ids`.
        length: Tokens.
        seed: Of the draw.
        prefix: `teacher0.` for inputs made for another tokenizer.

    Returns:
        The batch of one row, and how many of its tokens are the data's.
    """
    rows, total = [], 0
    for row in data.columns[f"{prefix}input_ids"]:
        rows.append(np.asarray(row, dtype=np.int64))
        total += len(rows[-1])
        if total >= length:
            break
    ids = np.concatenate(rows)[:length]
    count = len(ids)
    if count < length:
        # repeating the text would make equal keys, which are easier to approximate than real ones
        drawn = np.random.default_rng(seed).choice(ids, length - count)
        ids = np.concatenate([ids, drawn])
    batch = {"input_ids": torch.from_numpy(ids)[None]}
    if task.classifies:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch, count


def peak_bytes(model: nn.Module, run: Callable[[], object], device: str) -> int | None:
    """Most memory that a pass holds at a time beyond what there was before it.

    Counted by torch's allocators, so it does not depend on what the system keeps back.

    Args:
        model: The model.
        run: The pass.
        device: Where it runs.

    Returns:
        Bytes; None for a graph, whose runtime allocates by itself, and for devices without a count.
    """
    if isinstance(model, OnnxModel):
        return None
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return int(torch.cuda.max_memory_allocated()) - before
    if device != "cpu":
        return None
    return _peak_on_cpu(run)


def _peak_on_cpu(run: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # read when the first profile starts, which prints otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        run()
    held = most = 0
    recorder: Any = seen.profiler
    for event in recorder.kineto_results.events():
        if event.name() == "[memory]" and event.device_type().name == "CPU":
            held += event.nbytes()
            most = max(most, held)
    return int(most)


def as_json(proof: Proof, real: dict[int, int], notes: Sequence[str]) -> dict[str, Any]:
    """The field `lengths` of the `--json` object."""
    mine, other = proof.student.lengths, proof.teacher.lengths if proof.teacher else {}
    found: dict[str, Any] = {"student": mine, "teacher": other, "real_tokens": real, "notes": list(notes)}
    for name, key in (("ratio", "median_ms"), ("memory_ratio", "peak_bytes")):
        found[name] = {length: _ratio(other[length][key], mine[length][key]) for length in other}
    return found


def _ratio(other: float | None, mine: float | None) -> float | None:
    """How many times as much the other takes; None where one is not known, such as the memory of a graph."""
    return other / mine if other is not None and mine else None


def notes_on(proof: Proof, real: dict[int, int]) -> list[str]:
    """What a reader must know of the measured lengths: where inputs were made up, and where attention was exact."""
    notes = []
    made = [length for length, count in real.items() if count < length]
    if made:
        held = max(real.values())
        words = ", ".join(map(str, made))
        notes.append(
            f"The test rows hold {held} tokens: at {words} the rest of the input is drawn from them at random."
        )
    for side in (proof.student, proof.teacher):
        for length, found in side.lengths.items() if side else ():
            if side is not None and "approximate" in found:
                shares = f"{found['approximate']:.0f} of {found['calls']:.0f}"
                notes.append(f"At {length} tokens {shares} attention calls of `{side.name}` are approximate.")
    return notes


def section(notes: Sequence[str]) -> list[str]:
    """Lines of report.md."""
    lines = [
        "## Lengths",
        "",
        "Times and memory at a number of tokens: a forward pass of one sequence, test rows joined",
    ]
    lines += ["and cut; memory is the most that a pass holds at a time beyond the weights.", ""]
    return lines + ([*(f"- {note}" for note in notes), ""] if notes else [])
