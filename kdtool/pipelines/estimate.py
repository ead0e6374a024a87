"""What a run will need: rough figures of memory, disk and time, from shapes and a moment of arithmetic.

Nothing is trained for them. Memory of weights, gradients and optimiser is exact; activations follow the
usual count for transformers; time divides the arithmetic of the run by a share of the speed of a large
matrix product measured here. Expect the right order of magnitude, not the right digit.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from kdtool.data.examples import Examples
from kdtool.divergences import held
from kdtool.pipelines.caching import WORTH
from kdtool.registry import METHODS, TASKS
from kdtool.run import Run
from kdtool.sections import RunConfig
from kdtool.tasks._base import Task
from kdtool.teacher_cache import CHUNK

_VALUES_PER_LAYER = 17
"""Numbers that a transformer layer keeps for its backward pass, for each token and unit of width."""

_WHOLE = {True: 8, False: 3}
"""Tensors as large as the logits of what counts that a loss holds with a teacher and without, if it takes them whole.

Two and one of them are the models' own, which are of all tokens.
"""

_TOKENS_PER_WORD = 1.4
_SAMPLE = 500
_EFFICIENCY = 0.7
"""Share of the speed of a large matrix product that training reaches."""

_LONGEST = 512
_CHECKPOINTS = 3
"""Two are kept while the third is written."""


@dataclass(frozen=True, slots=True)
class Size:
    """A model's measures.

    Attributes:
        parameters: All of them.
        working: Those that multiply every token: without tables that are only looked up.
        width: Hidden size; None for what is no transformer.
        layers: Depth; None likewise.
        tokens: Longest sequence it takes, or the patches of an image; None where unknown.
        classes: Numbers in one row of logits.
    """

    parameters: int
    working: int
    width: int | None = None
    layers: int | None = None
    tokens: int | None = None
    classes: int = 0


def size_of(config: Any, model: nn.Module) -> Size:
    """Measures of a model whose weights need not be there (device `meta`)."""
    total = sum(p.numel() for p in model.parameters())
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    looked_up = sum(size for key, size in tables.items() if key not in heads)
    inner = getattr(config, "backbone_config", None) or config
    tokens = getattr(inner, "max_position_embeddings", None)
    if getattr(inner, "patch_size", None) and isinstance(getattr(inner, "image_size", None), int):
        tokens = (inner.image_size // inner.patch_size) ** 2 + 1
    width, layers = (getattr(inner, name, None) for name in ("hidden_size", "num_hidden_layers"))
    last = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    return Size(total, total - looked_up, width, layers, tokens, last[-1] if last else 0)


def tokens_of(config: RunConfig, task: Task, rows: Examples | None, size: Size) -> tuple[float, int, int] | None:
    """Mean and largest number of tokens of a training row, and how many rows there are; None where unknown.

    Rows of plain text for language models are windows, so there are fewer or more of them than texts.
    """
    if rows is None or size.tokens is None:
        return None
    names = [name for name in ("text", "text_pair", "prompt", "input", "response") if name in rows.columns]
    if not names:
        return (float(size.tokens), size.tokens, len(rows)) if "image" in rows.columns else None
    bound = config.data.max_length or min(size.tokens, _LONGEST)
    chosen = np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows)), dtype=np.int64)
    columns = [rows.columns[name] for name in names]
    lengths = np.array([sum(len(str(column[int(i)]).split()) for column in columns) for i in chosen])
    lengths = lengths * _TOKENS_PER_WORD + 2
    if not task.classifies and "text" in names:
        return float(bound), bound, max(1, round(float(lengths.mean()) * len(rows) / bound))
    lengths = np.minimum(lengths, bound)
    return float(lengths.mean()), int(lengths.max()), len(rows)


def speed(run: Run) -> float:
    """Floating-point operations per second of a large matrix product on the run's device."""
    on_gpu = run.device.startswith("cuda")
    side = 4096 if on_gpu else 768
    kind = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(run.dtype or "", torch.float32)
    left = torch.ones(side, side, device=run.device, dtype=kind)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        left @ left
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def estimate(
    config: RunConfig,
    run: Run,
    student: Size | None,
    teacher: Size | None,
    tokens: tuple[float, int, int] | None,
    steps: int,
) -> dict[str, str]:
    """Memory of a process, disk, and for training the time, each in words.

    Args:
        config: The run's configuration.
        run: Gives device, number format and number of processes.
        student: Measures of what is trained, or of the only model.
        teacher: Measures of the teacher.
        tokens: From `tokens_of`.
        steps: Optimiser steps.
    """
    trained, fixed = student.parameters if student else 0, teacher.parameters if teacher else 0
    if config.command != "distill" or student is None:
        weights = _bytes(4 * (trained + fixed))
        # commands with one model write it, or less; an evaluation writes next to nothing
        written = trained or fixed if config.command != "evaluate" else 0
        return {"memory": f"{weights} for weights, and activations", "disk": _bytes(4 * written)}
    cache = _cache_bytes(config, teacher, tokens, steps * run.world)
    parts = memory_parts(config, run, student, teacher, tokens, cache > 0)
    disk = 4 * trained + _CHECKPOINTS * (_state(config) - 4) * trained + cache
    result = {
        "memory": _told(parts),
        "disk": _bytes(disk) + (f", of which {_bytes(cache)} teacher cache" if cache else ""),
    }
    result["time"] = _time(config, run, student, teacher, tokens, steps, cache > 0)
    return result


def _told(parts: dict[str, int]) -> str:
    """Sum and parts of a process's memory, in words."""
    said = f"{_bytes(sum(parts.values()))} a process ({', '.join(f'{k} {_bytes(v)}' for k, v in parts.items() if v)})"
    return said if "activations" in parts else f"{said}, and activations"


def _state(config: RunConfig) -> int:
    """Bytes for each trained parameter: itself, its gradient and one or two moments."""
    return 12 if config.train.optimizer == "sgd" else 16


def memory_parts(
    config: RunConfig,
    run: Run,
    student: Size,
    teacher: Size | None,
    tokens: tuple[float, int, int] | None,
    cached: bool,
) -> dict[str, int]:
    """Bytes that a process of a training run holds, by what they are for; `activations` where they are known.

    Args:
        config: The run's configuration.
        run: Gives device, number format and number of processes.
        student: Measures of what is trained.
        teacher: Measures of the teacher.
        tokens: From `tokens_of`.
        cached: Whether the teacher is read from a cache.
    """
    own, said = _state(config) * student.parameters, "weights, gradients, optimiser"
    if run.world > 1 and config.train.parallel == "fsdp2":
        # a shard of everything, and two layers gathered at a time
        own = own // run.world + 8 * student.parameters // max(1, student.layers or 1)
        said = f"1/{run.world} of {said}, two whole layers"
    parts = {"teacher": 4 * teacher.parameters if teacher else 0, said: own}
    active = _activations(config, run, student, tokens)
    if active is None or tokens is None:
        return parts
    parts["activations"] = active
    if _predicts_tokens(config):
        parts["logits"] = _logits(config, run, student, teacher, tokens[1], cached)
    return parts


def _activations(config: RunConfig, run: Run, student: Size, tokens: tuple[float, int, int] | None) -> int | None:
    """Bytes kept for the backward pass of one batch of the longest rows; None where unknown."""
    if tokens is None or not student.width or not student.layers:
        return None
    each = 2 if run.dtype else 4
    units = config.train.batch_size * tokens[1]
    return units * student.width * student.layers * _VALUES_PER_LAYER * each


def _logits(config: RunConfig, run: Run, student: Size, teacher: Size | None, longest: int, cached: bool) -> int:
    """Bytes of a language model's logits of one batch, and of what the loss makes of them.

    Args:
        config: The run's configuration.
        run: Context.
        student: Measures of the student.
        teacher: Measures of the teacher.
        longest: Tokens of the longest row.
        cached: Whether the teacher is read from a cache.
    """
    units, kind = config.train.batch_size * longest, METHODS.get(config.method_name)
    asked = teacher if _reads(config) else None
    others = asked.classes if asked is not None else 0
    told = 0
    if cached and config.train.teacher_cache_top_k is None:
        # whole logits from the cache; while it is filled, those of a chunk of rows and the ones that count of them
        told = 4 * others * (units + 2 * CHUNK * longest)
        others = 0
    chunk = kind.chunk(METHODS.build_config(config.method_name, config.method_values))
    task = TASKS.get(str(config.data.task))
    if chunk is None or task.has_states is Task.has_states:
        return told + _whole(config, units, max(student.classes, others), asked is not None)
    device = run.device.split(":")[0]
    found = told + held(units, student.classes, others, device, chunk or None, run.dtype is not None)
    head, their = (one.classes * (one.width or 0) if one else 0 for one in (student, asked))
    if run.dtype:
        found += 2 * (head + their)  # heads in the format of the products
    return found + (4 * head if config.train.grad_accum > 1 else 0)  # the gradient that is to be added


def _whole(config: RunConfig, units: int, classes: int, taught: bool) -> int:
    """Bytes of a loss that takes logits [units, classes] whole; masked-lm counts only what is hidden."""
    share = config.data.mask_share if config.data.task == "masked-lm" else 1.0
    own = 2 if taught else 1
    return round(4 * units * classes * (own + (_WHOLE[taught] - own) * share))


def training_stage(
    config: RunConfig, run: Run, model: Size, tokens: tuple[float, int, int] | None, extra: dict[str, int]
) -> dict[str, int]:
    """Bytes that `compress` holds while a compressor trains, by what they are for.

    Args:
        config: The run's configuration.
        run: Gives the number format.
        model: Measures of the model.
        tokens: From `tokens_of`.
        extra: What the compressor holds besides; activations are added to those of the model.
    """
    parts = {"model": 4 * model.parameters} | {name: size for name, size in extra.items() if name != "activations"}
    active = _activations(config, run, model, tokens)
    if active is None or tokens is None:
        return parts
    parts["activations"] = active + extra["activations"]
    if _predicts_tokens(config):
        parts["logits"] = _whole(config, config.train.batch_size * tokens[1], model.classes, taught=False)
    return parts


def estimate_stage(model: Size, parts: dict[str, int]) -> dict[str, str]:
    """Memory and disk of a compressor that trains, in words; its checkpoints hold what it trains.

    Args:
        model: Measures of the model.
        parts: From `training_stage`.
    """
    trained = next(size for name, size in parts.items() if "optimiser" in name)
    return {"memory": _told(parts), "disk": _bytes(4 * model.parameters + _CHECKPOINTS * trained * 3 // 4)}


def _predicts_tokens(config: RunConfig) -> bool:
    return config.data.task is not None and not TASKS.info(config.data.task).facts.get("classifies", True)


def _reads(config: RunConfig) -> bool:
    return bool(METHODS.info(config.method_name).facts.get("reads_teacher", True))


def _cache_bytes(config: RunConfig, teacher: Size | None, tokens: tuple[float, int, int] | None, steps: int) -> int:
    """Size of the teacher cache; 0 where there will be none.

    Args:
        config: The run's configuration.
        teacher: Measures of the teacher.
        tokens: From `tokens_of`.
        steps: Optimiser steps of all processes.
    """
    train = config.train
    if teacher is None or tokens is None or not _reads(config) or train.teacher_cache is False:
        return 0
    if config.augment.active and not config.augment.views:
        return 0  # each epoch has views of its own
    if train.teacher_cache_top_k is None and not METHODS.get(config.method_name).cacheable:
        return 0
    seen = steps * train.grad_accum * train.batch_size
    if train.teacher_cache is None and train.teacher_cache_dir is None and seen <= WORTH * tokens[2] * _views(config):
        return 0
    units = tokens[2] * (tokens[1] - 1 if _predicts_tokens(config) else 1)
    kept = train.teacher_cache_top_k
    size = units * (4 * teacher.classes if kept is None else 6 * min(kept, teacher.classes) + 4) * _views(config)
    return size if size <= train.teacher_cache_limit * 2**20 else 0


def _views(config: RunConfig) -> int:
    """How many views of each row a cache holds."""
    return max(1, config.augment.views) if config.augment.active else 1


def _time(
    config: RunConfig,
    run: Run,
    student: Size,
    teacher: Size | None,
    tokens: tuple[float, int, int] | None,
    steps: int,
    cached: bool,
) -> str:
    if tokens is None or not student.width:
        return "not estimated: the length of the inputs or the shape of the model is not known"
    mean, _, rows = tokens
    seen = steps * config.train.grad_accum * config.train.batch_size * run.world
    work = 6.0 * student.working * mean * seen
    if teacher is not None and _reads(config):
        work += 2.0 * teacher.working * mean * (min(seen, rows * _views(config)) if cached else seen)
    measured = speed(run)
    seconds = work / (measured * _EFFICIENCY * run.world)
    share = f"{work / run.world / 1e12:.3g} TFLOP" + (" a process" if run.world > 1 else "")
    return (
        f"about {_duration(seconds)} of training "
        f"({share} at {_EFFICIENCY:g} of the {measured / 1e9:,.0f} GFLOP/s of a matrix product here)"
    )


def _bytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{max(1, round(size / 2**20))} MiB"


def _duration(seconds: float) -> str:
    for limit, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= limit:
            return f"{seconds / limit:.1f} {name}"
    return f"{max(1, round(seconds))} s"


def without_layers(size: Size, removed: int, left: int) -> Size:
    """Measures of a model that lost some layers.

    Args:
        size: Before.
        removed: Parameters that went.
        left: Layers that stay.
    """
    return Size(size.parameters - removed, size.working - removed, size.width, left, size.tokens, size.classes)
