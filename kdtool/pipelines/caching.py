"""Letting a method read its frozen teacher from a cache, or from a cache alone."""

import shutil
from pathlib import Path
from typing import Any

from kdtool.errors import ConfigProblem, UsageProblem
from kdtool.models import Loaded
from kdtool.pipelines import setup
from kdtool.pipelines.asking import filled, learns_from_scores
from kdtool.run import Run
from kdtool.sections import RunConfig
from kdtool.teacher_cache import (
    Kept,
    TeacherCache,
    data_hash,
    fingerprint,
    is_of_another_run,
    read_marks,
    tokenizer_hash,
)
from kdtool.train import parallel
from kdtool.train.loop import Trainer

WORTH = 1.25
"""Epochs from which a teacher cache pays: its chunks are computed whole."""


def attach_cache(trainer: Trainer, teacher: Loaded | None, config: RunConfig, run: Run, default: Path) -> None:
    """Let the method read its frozen teacher from a cache, where asked for or worth it.

    Raises:
        ConfigProblem, UsageProblem: the cache belongs to another run, is too large, or the method cannot use it.
    """
    if config.teacher.cache is not None or learns_from_scores(config):
        known = config.teacher.cache
        folder = filled(trainer, config, run) if known is None else Path(known).expanduser()
        trainer.method.caches[0] = _instead(folder, trainer, config, run)
        return
    train, method = config.train, trainer.method
    wanted = train.teacher_cache if train.teacher_cache is not None else train.teacher_cache_dir is not None or None
    views = trainer.views
    seen_again = trainer.plan.steps * train.grad_accum > WORTH * trainer.plan.per_epoch * (views.count if views else 1)
    if views is not None and not views.count:
        if wanted:
            raise UsageProblem(
                "no teacher cache can hold the views of every epoch", hint="--set augment.views=8 uses eight in turn"
            )
        return
    if teacher is None or not method.reads_teacher or wanted is False or not (wanted or seen_again):
        return
    kept = _kept(trainer, config)
    if not method.cacheable and kept is None:
        if wanted:
            run.reporter.warn(f"no teacher cache: {config.method_name} compares hidden states or texts made meanwhile")
        return
    folder = Path(train.teacher_cache_dir).expanduser() if train.teacher_cache_dir else default
    data = trainer.plan.data
    marks = fingerprint(teacher, data, run, setup.processor_key(teacher.processor), config.augment, kept)
    marks |= {"task": method.task.name} if kept else {}
    marks |= {"views": views.mark} if views is not None else {}
    limit = train.teacher_cache_limit * 2**20
    try:
        with parallel.first_alone(run):
            if run.rank == 0 and train.teacher_cache_dir is None and is_of_another_run(folder, marks):
                shutil.rmtree(folder)  # our own, and what it was made with has changed since
            cache = TeacherCache(folder, method.task, teacher, data, run, 0, marks, limit, views, kept)
    except UsageProblem as problem:
        if wanted:
            raise
        run.reporter.info(f"no teacher cache: {problem.message}")
        return
    method.caches[0] = cache
    run.reporter.info(f"teacher cache: {cache.share:.0%} of {cache.size} rows are there")


def _kept(trainer: Trainer, config: RunConfig) -> Kept | None:
    """What the cache keeps of a language model, where only the likeliest tokens are wanted.

    Raises:
        UsageProblem: the method needs more.
    """
    k = config.train.teacher_cache_top_k
    if k is None:
        return None
    return Kept(k, temperature_of(trainer.method, config, "train.teacher_cache_top_k"))


def temperature_of(method: Any, config: RunConfig, what: str) -> float:
    """The temperature at which the method compares with the likeliest tokens.

    Raises:
        UsageProblem: it cannot.
    """
    found = method.told_at()
    if found is None:
        raise UsageProblem(
            f"{what}: method {config.method_name} on {method.task.name} cannot learn from likely tokens alone",
            why="it needs all logits, more than one temperature, or is not for language models",
            hint="--method kd and supervised-kd on causal-lm and seq2seq-lm can",
        )
    return float(found)


def _instead(folder: Path, trainer: Trainer, config: RunConfig, run: Run) -> TeacherCache:
    """The cache that stands for the teacher.

    Raises:
        ConfigProblem, UsageProblem: it is of other data, another tokenizer or temperature, or not whole.
    """
    marks, method = read_marks(folder), trainer.method
    kept = Kept(int(marks["k"]), temperature_of(method, config, "teacher.cache"))
    data, student = trainer.plan.data, method.student_loaded
    wanted = {
        "task": method.task.name,
        "tokenizer": tokenizer_hash(student.processor),
        "temperature": repr(kept.temperature),
        "data": data_hash(data),
    }
    differing = [name for name, value in wanted.items() if marks.get(name) != value]
    if differing:
        known = {name: (marks.get(name), wanted[name]) for name in differing if name in ("task", "temperature")}
        told = [f"{name} ({found} there, {asked} here)" for name, (found, asked) in known.items()]
        raise ConfigProblem(
            f"the teacher cache {folder} does not fit this run",
            why=f"different {', '.join(told + [name for name in differing if name not in known])}",
            hint="the same --data and data.* settings, a student with the teacher's tokenizer, the same temperature",
        )
    head = len(student.model.get_output_embeddings().weight)
    if int(marks["vocabulary"]) > head:
        raise ConfigProblem(
            f"the teacher cache {folder} does not fit this run", why=f"its tokens go beyond the student's {head}"
        )
    everything = {name: value for name, value in marks.items() if name != "rows"}
    cache = TeacherCache(folder, method.task, None, data, run, 0, everything, 2**63, None, kept)
    named = ("model", "revision", "endpoint", "k", "temperature")
    run.provenance["teacher_cache"] = {name: marks[name] for name in named if name in marks}
    run.reporter.info(
        f"the teacher is a cache: {marks.get('model')}, the {kept.k} likeliest tokens of {cache.size} rows"
    )
    return cache
