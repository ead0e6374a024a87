"""Weight-inherited distillation: learn linear maps around every matrix, shrink most of them away, multiply them in.

It trains, on the task's own loss alone, and makes encoders narrower at full depth: fewer hidden dimensions,
smaller or fewer heads, fewer feed-forward neurons. The result is an ordinary, smaller model.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from kdtool.compressors._base import Context, Made, body_config, rebuilt
from kdtool.compressors._wid_anatomy import Anatomy, anatomy_of
from kdtool.compressors._wid_memory import memory
from kdtool.compressors._wid_merge import largest_dropped_norm
from kdtool.compressors._wid_method import Goal, Inheritance
from kdtool.compressors._wid_schedule import intervals
from kdtool.compressors._wid_step import left_of_one
from kdtool.errors import KdtoolError, ModelProblem, UsageProblem
from kdtool.lazy import held
from kdtool.models import Loaded
from kdtool.sections import TrainSection
from kdtool.train.loop import Trainer
from kdtool.train.rehearsal import rehearse
from kdtool.train.schedule import factor
from kdtool.verify import outputs

paper = "Wu et al.: Weight-Inherited Distillation for Task-Agnostic BERT Compression, 2024, arXiv:2305.09098"
trains = True
tasks = frozenset({"masked-lm", "text-classification", "image-classification"})
needs = "an encoder"

_PUBLISHED_INTERVAL = 500
_RATE = 0.04
"""Learning rate times width: a step moves the outputs of a wide map more than those of a narrow one."""
_SHARE = 4
"""The schedule ends in the first of so many parts of the run, where no interval is given."""
_INEXACT = 1e-3
"""A merge that changes the outputs by more than this share of their norm is no merge."""
_LEFT = 0.1
"""A run that shrinks what it drops to no less than this says so before it begins."""
_ABRUPT = 0.05
"""Dropped entries whose removal changes the outputs by more than this share of their norm had not yet shrunk."""


@dataclass(frozen=True)
class Config:
    """Settings."""

    hidden: Annotated[int, Field(gt=0)]
    """Hidden size to reach; the feed-forward width shrinks by the same share."""
    strategy: Literal["dim", "head"] = "dim"
    """Make every attention head smaller (dim), or drop whole heads (head)."""
    steps: Annotated[int, Field(gt=0)] = 10000
    """Optimiser steps (paper: 400,000, on a corpus)."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the compactors (default: by width and length; 5e-5 in the paper's long run at 768)."""
    weights_lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the model's own weights (default: a fifth of that; paper: a fiftieth)."""
    interval: Annotated[int, Field(gt=0)] | None = None
    """Steps between two choices of what to drop (paper: 500; default: so that a quarter of the steps are enough)."""
    penalty: Annotated[float, Field(gt=0)] = 20.0
    """Lambda: how hard dropped entries are pulled towards zero; many times the default makes small ones swing."""
    freeze: bool = False
    """Choose no more once the schedule has ended; the paper goes on choosing."""


def _check_shape(loaded: Loaded, config: Config, anatomy: Anatomy) -> None:
    """Refuse a size that the configuration of such a model cannot state.

    Raises:
        UsageProblem: says why.
    """
    hidden, asked = anatomy.hidden, config.hidden
    if asked >= hidden:
        raise UsageProblem(
            f"wid: hidden={asked} makes nothing smaller", why=f"'{loaded.ref}' has {hidden}", hint="ask for less"
        )
    unit, what = (
        (anatomy.heads, f"{anatomy.heads} heads of equal size")
        if config.strategy == "dim"
        else (anatomy.head_size, f"whole heads of {anatomy.head_size}")
    )
    if asked % unit:
        near = max(unit, round(asked / unit) * unit)
        raise UsageProblem(
            f"wid: hidden={asked} cannot be divided into {what}",
            why=f"strategy {config.strategy} needs a multiple of {unit}",
            hint=f"--set method.hidden={near if near < hidden else near - unit}",
        )
    if anatomy.intermediate * asked % hidden:
        raise UsageProblem(
            f"wid: hidden={asked} would leave {anatomy.intermediate * asked / hidden:g} feed-forward neurons",
            why="they shrink by the same share",
            hint="choose another multiple",
        )


def settled(config: Config, anatomy: Anatomy, warmup: float) -> Config:
    """Learning rates where they were left open.

    There is no bias correction, so step t is 1 / sqrt(1 - 0.999^t) times as long as lr says, and the longest step of
    a short run comes at the end of its warm-up: the default makes up for it.

    Args:
        config: As given.
        anatomy: Of the model.
        warmup: Share of the steps with rising learning rate.
    """
    lr = config.lr or _RATE / anatomy.hidden * math.sqrt(1 - 0.999 ** max(1.0, warmup * config.steps))
    return replace(config, lr=lr, weights_lr=config.weights_lr or lr / 5)


def shrinks_to(config: Config, goal: Goal, train: TrainSection) -> float:
    """What the run leaves of the entries that it drops last, as a share; see `left_of_one`."""
    assert config.lr is not None
    rates = [config.lr * factor(step, config.steps, train.warmup, train.schedule) for step in range(config.steps)]
    return left_of_one(rates, config.penalty, goal.interval, goal.interval * goal.schedule)


def goal_of(config: Config, anatomy: Anatomy) -> Goal:
    """The schedule.

    Raises:
        UsageProblem: it does not end before training does.
    """
    needed = intervals(anatomy.hidden, config.hidden, anatomy.head_size, config.strategy)
    interval = config.interval or min(_PUBLISHED_INTERVAL, config.steps // (_SHARE * needed))
    if not interval or needed * interval >= config.steps:
        least = needed * config.interval + 1 if config.interval else _SHARE * needed
        raise UsageProblem(
            f"wid: {config.steps} steps are too few",
            why=f"what is dropped grows over {needed} intervals of {interval or 1} and more steps",
            hint=f"--set method.steps={least} at least" + (", or a smaller interval" if config.interval else ""),
        )
    return Goal(config.hidden, config.strategy, interval, config.penalty, config.freeze, needed)


def _shapes(config: Config, anatomy: Anatomy) -> dict[str, int]:
    """Keys of the configuration that change."""
    heads = anatomy.heads if config.strategy == "dim" else config.hidden // anatomy.head_size
    sizes = (config.hidden, heads, anatomy.intermediate * config.hidden // anatomy.hidden)
    return dict(zip(anatomy.stated, sizes, strict=True))


def shrunk(loaded: Loaded, config: Config, anatomy: Anatomy) -> Any:
    """The configuration of the result.

    Raises:
        ModelProblem: it would describe another architecture.
    """
    changed = copy.deepcopy(loaded.model.config)
    values = body_config(changed)
    embeddings = getattr(values, "embedding_size", None)
    if embeddings == anatomy.hidden:
        values.embedding_size = config.hidden
    elif embeddings == config.hidden:
        raise ModelProblem(
            f"wid: '{loaded.ref}' cannot become as wide as its embeddings",
            why="the map from one to the other would be missing then",
            hint=f"another --set method.hidden than {embeddings}",
        )
    for key, value in _shapes(config, anatomy).items():
        setattr(values, key, value)
    return changed


def untied(loaded: Loaded, anatomy: Anatomy) -> Loaded:
    """A copy whose decoder has weights of its own, since the merged one cannot share those of the embeddings."""
    model: Any = copy.deepcopy(loaded.model)
    if "mlm" in anatomy.sizes and getattr(model.config, "tie_word_embeddings", False):
        changed = copy.deepcopy(model.config)
        changed.tie_word_embeddings = False
        return rebuilt(loaded, Made(changed, held(model.state_dict())))
    return Loaded(model, loaded.processor, loaded.ref, None, None, loaded.facts)


def _check_fit(method: Inheritance, loaded: Loaded, config: Config) -> None:
    """Shapes of a merge against those of the model to come, before anything is trained.

    Raises:
        ModelProblem: they differ, so some part of this architecture is not known.
    """
    method.choose(method.config.schedule)
    rebuilt(loaded, Made(shrunk(loaded, config, method.anatomy), held(method.inherited())))
    method.keep_all()


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def _exactness(method: Inheritance, made: nn.Module, context: Context) -> dict[str, float]:
    """What zeroing and merging did to the outputs on a batch.

    Raises:
        KdtoolError: the merged model is not the masked one.
    """
    method.to("cpu")
    assert context.batches
    batch = context.batches[0]
    trained, masked, merged = (outputs(context.task, m, batch) for m in (method.student, method.masked(), made))
    if _relative(merged, masked) > _INEXACT:
        raise KdtoolError(
            "wid: the merged model does not give the outputs of the one it was merged from",
            why=f"they differ by {_relative(merged, masked):.2g} of their norm",
        )
    return {
        "zeroing_change": _relative(masked, trained),
        "merge_difference": float((merged - masked).abs().max()),
    }


def training_memory(loaded: Loaded, config: Config, tokens: int) -> dict[str, int]:
    """Bytes that training holds besides the model, by what they are for; of activations what it adds to the model's.

    Args:
        loaded: The model, whose weights need not be there (device `meta`).
        config: Settings.
        tokens: Of a batch.

    Raises:
        UsageProblem: a size or a schedule that does not fit.
        ModelProblem: no encoder of a kind that it knows.
    """
    anatomy = anatomy_of(loaded.model)
    _check_shape(loaded, config, anatomy)
    goal_of(config, anatomy)
    return memory(loaded.model, anatomy, tokens)


def compress(loaded: Loaded, config: Config, context: Context) -> Loaded:
    """A narrower model that has inherited the weights of this one.

    Raises:
        UsageProblem: no data, or a size, a schedule or an optimiser that does not fit.
        ModelProblem: no encoder of a kind that it knows.
        KdtoolError: what the training loop raises.
    """
    if context.rows is None or context.batches is None:
        raise UsageProblem("wid trains on data, and none was given", hint="add --data DATA with rows to train on")
    if context.train.optimizer != "adamw":
        raise UsageProblem("wid has an AdamW of its own", hint="leave out train.optimizer")
    anatomy = anatomy_of(loaded.model)
    _check_shape(loaded, config, anatomy)
    config = settled(config, anatomy, context.train.warmup)
    goal, source = goal_of(config, anatomy), untied(loaded, anatomy)
    method = Inheritance(goal, source, anatomy, context.task)
    _check_fit(method, source, config)
    settings = context.train.model_copy(
        update={"max_steps": config.steps, "lr": config.lr, "head_lr": config.weights_lr}
    )
    trainer = Trainer(
        method, context.rows, settings, context.run, method.is_own_weight, context.checkpoints, context.views
    )
    rehearse(trainer)
    left = shrinks_to(config, goal, context.train)
    if left > _LEFT:
        context.run.reporter.warn(
            f"wid: {config.steps} steps at a rate of {config.lr:.2g} leave {left:.2g} of what is dropped, and "
            "cutting that off will hurt: give it more method.steps, or a higher method.lr"
        )
    context.run.reporter.info(
        f"wid: training {sum(p.numel() for p in method.parameters()):,} parameters for {trainer.plan.steps} steps"
    )
    history = trainer.train()
    made = rebuilt(source, Made(shrunk(source, config, anatomy), held(method.inherited())))
    norm = largest_dropped_norm(method.student, anatomy, method.keep)
    exact = _exactness(method, made.model, context)
    if exact["zeroing_change"] > _ABRUPT:
        context.run.reporter.warn(
            f"wid: what was dropped had not shrunk yet, and its removal changed the outputs by "
            f"{exact['zeroing_change']:.2g} of their norm: give it more method.steps"
        )
    made.facts |= {
        "shapes": _shapes(config, anatomy),
        "steps": history.steps,
        "interval": goal.interval,
        "lr": config.lr,
        "weights_lr": config.weights_lr,
        "loss": history.rows[-1]["loss"],
        "largest_dropped_norm": norm,
        **exact,
        "note": (
            f"`wid`: largest norm of what was dropped {norm:.2g}, its removal changed the outputs by "
            f"{exact['zeroing_change']:.2g} of their norm; merging moved no output by more than "
            f"{exact['merge_difference']:.2g}."
        ),
    }
    return made
