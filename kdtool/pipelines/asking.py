"""Filling a cache of likely tokens from a teacher behind an endpoint, before a method learns from it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kdtool.endpoint import Choice, EndpointRef
from kdtool.endpoint.likely import Scores
from kdtool.errors import UsageProblem
from kdtool.registry import METHODS
from kdtool.run import Run
from kdtool.sections import RunConfig
from kdtool.tasks._base import LABELS
from kdtool.tasks._language import IGNORED
from kdtool.teacher_cache import Kept, TeacherCache, served_fingerprint
from kdtool.train import parallel
from kdtool.train.loop import Trainer

_TOP_K = 20
"""Likeliest tokens asked for where nothing is said: as many as vLLM gives unless it is told otherwise."""


def learns_from_scores(config: RunConfig) -> bool:
    """Whether the teacher is an endpoint, and the method wants what it thinks of each token and not its texts."""
    named = EndpointRef.matches(config.teacher.model)
    return named and not METHODS.info(config.method_name).facts.get("teacher_writes")


def check_scores(task_name: str, temperature: float) -> None:
    """Refuse what an endpoint's log-probabilities cannot serve.

    Args:
        task_name: Name of the task.
        temperature: At which the method compares.

    Raises:
        UsageProblem: it is another task, or not temperature 1.
    """
    if task_name != "causal-lm":
        raise UsageProblem(f"an endpoint has log-probabilities for causal-lm, and the task is {task_name}")
    if temperature != 1:
        raise UsageProblem(
            f"an endpoint gives log-probabilities at temperature 1, and the method wants them at {temperature:g}",
            why="those at another cannot be told from the likeliest tokens",
            hint="--set method.temperature=1",
        )


def filled(trainer: Trainer, config: RunConfig, run: Run) -> Path:
    """Folder of the cache, with what the endpoint says of all training rows; only what is missing is asked for.

    Raises:
        EndpointProblem, ModelProblem: the endpoint does not give it; what it gave before is kept.
        ConfigProblem, UsageProblem, OutputProblem: the cache is of something else, too large, or cannot be written.
    """
    reference = EndpointRef.parse(str(config.teacher.model))
    method, data = trainer.method, trainer.plan.data
    tokenizer = method.student_loaded.processor
    folder = Path(str(config.train.teacher_cache_dir)).expanduser()
    kept = Kept(min(config.train.teacher_cache_top_k or _TOP_K, len(tokenizer)), 1.0)
    marks = served_fingerprint(reference.model, reference.url, tokenizer, data, kept) | {"task": method.task.name}
    limit = config.train.teacher_cache_limit * 2**20
    with parallel.first_alone(run):
        if run.rank == 0:
            cache = TeacherCache(folder, method.task, None, data, run, 0, marks, limit, None, kept, told=True)
            _fill(cache, Scores(reference, tokenizer, kept.k), run)
    return folder


def _fill(cache: TeacherCache, scores: Scores, run: Run) -> None:
    """Ask about the rows of the chunks that are missing, and fill each chunk once its rows are all there."""
    from kdtool.endpoint.client import Endpoint

    missing = cache.missing()
    there = 1 - len(missing) / len(cache.chunks)
    run.reporter.info(f"teacher cache: {there:.0%} of {cache.size} rows are there, {scores.k} likeliest tokens of each")
    rows = [(chunk, int(row)) for chunk in missing for row in cache.chunks[chunk]]
    if not rows:
        return
    probe = Endpoint(scores.reference, run, scores.texts)
    probe.check()
    first = _tokens(cache, rows[0][1])[0]
    scores.check(probe.ask(scores.ask(first))[0], first)
    found: dict[int, dict[str, np.ndarray]] = {}
    left = {chunk: len(cache.chunks[chunk]) for chunk in missing}
    done = 0

    def take(number: int, choices: list[Choice]) -> None:
        nonlocal done
        chunk, row = rows[number]
        found[row] = scores.read(choices[0], *_tokens(cache, row))
        left[chunk] -= 1
        done += 1
        if not left[chunk]:
            parts = [found.pop(int(own)) for own in cache.chunks[chunk]]
            cache.put(chunk, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
        run.reporter.progress("asking", done, len(rows), {})

    def asks() -> Iterator[Any]:
        for _, row in rows:
            yield scores.ask(_tokens(cache, row)[0])

    Endpoint(scores.reference, run, scores.sampling).ask_all(asks(), take)
    if scores.few:
        run.reporter.warn(
            f"the endpoint gave fewer than {scores.k} tokens at {scores.few:,} of {scores.places:,} places: "
            "the loss takes all others there as one"
        )


def _tokens(cache: TeacherCache, row: int) -> tuple[list[int], np.ndarray]:
    """Token ids [n] of a row, and which of those after the first are units, [n - 1] bool."""
    batch = cache.task.collate([cache.data[row]])
    ids: list[int] = batch["input_ids"][0].tolist()
    if LABELS not in batch:
        return ids, np.ones(len(ids) - 1, dtype=bool)
    return ids, (batch[LABELS][0, 1:] != IGNORED).numpy()
