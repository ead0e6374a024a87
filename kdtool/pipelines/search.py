"""`--budget`: the settings of compressors that leave a given share, found without training.

Every setting that a compressor declares as a dial, and that the user left open, starts where nothing is cut.
In each round the next notch of every dial is tried; the one that changes the outputs least for what it saves
is taken (a greedy descent), until the budget is met. The last dial turned, if it is a number, is then turned
back by bisection as far as the budget allows. Outputs are compared on the calibration rows, which are
training rows where there are some, and never the rows of the proof.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kdtool.compressors._base import run_over
from kdtool.config import stages
from kdtool.errors import ModelProblem, UsageProblem
from kdtool.gates import Budget, parse_budget
from kdtool.pipelines.stages import Standing
from kdtool.registry import COMPRESSORS
from kdtool.run import Run
from kdtool.saving import stored_bytes
from kdtool.sections import RunConfig
from kdtool.verify import latency

_BISECTIONS = 5
_LEAST = 1e-4
"""Share that a notch must save to count."""
_REPEATS = 15
"""Timed passes of a candidate, with a budget of latency."""
_OTHERWISE = frozenset({"layers", "energy", "size"})
"""Settings that win over a dial of their compressor, so that with one of them there is nothing to turn."""

Plan = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Dial:
    """A setting that may be turned down.

    Attributes:
        stage: Position of its compressor among the stages.
        name: Its name.
        levels: Its values, from nothing cut to most.
    """

    stage: int
    name: str
    levels: tuple[Any, ...]

    @property
    def numeric(self) -> bool:
        """Whether there is something between two levels."""
        return isinstance(self.levels[0], float)


@dataclass(slots=True)
class Point:
    """A candidate.

    Attributes:
        settings: Stage to the settings that were turned.
        parameters: Of the model that they make.
        bytes: Of its weights as stored.
        share: Of the budget's quantity that is left.
        divergence: Of its outputs from those of the model, in nats.
        taken: Whether the search went through it.
    """

    settings: dict[str, dict[str, Any]]
    parameters: int
    bytes: int
    share: float
    divergence: float
    taken: bool = False


@dataclass(slots=True)
class Found:
    """What a search gives.

    Attributes:
        plan: Stages with their settings.
        points: All candidates, in the order of their trial.
        budget: As asked.
    """

    plan: Plan
    points: list[Point] = field(default_factory=list)
    budget: str = ""


def dials_of(plan: Plan, notches: int, quantity: str) -> list[Dial]:
    """What may be turned, by stage: with a budget of parameters only what changes their number.

    Raises:
        UsageProblem: nothing is left open.
    """
    found = []
    for position, (name, values) in enumerate(plan):
        declared = COMPRESSORS.info(name).facts.get("dials", {})
        if _OTHERWISE & values.keys():
            continue
        for dial, least in declared.items():
            if dial in values or (isinstance(least, tuple) and quantity == "parameters"):
                continue
            steps = (1.0 - step / notches for step in range(notches))
            levels = least if isinstance(least, tuple) else (*(s for s in steps if s > least), least)
            found.append(Dial(position, dial, levels))
    if not found:
        raise UsageProblem(
            f"--budget: {','.join(name for name, _ in plan)} has no open setting that changes {quantity}",
            hint="leave a setting open, or add a method such as layers, width or low-rank",
        )
    return found


class _Search:
    """The state of one search; models of the stages before the one that changes are kept."""

    def __init__(self, start: Standing, plan: Plan, budget: Budget, config: RunConfig, run: Run) -> None:
        self.start, self.plan, self.budget, self.config, self.run = start, plan, budget, config, run
        self.dials = dials_of(plan, config.search.notches, budget.quantity)
        self.expected = run_over(start.loaded.model, start.context)
        self.bytes = stored_bytes(start.loaded, config.output.dtype)
        self.made: dict[str, Standing] = {}
        self.points: list[Point] = []

    def values(self, levels: Sequence[int]) -> list[Any]:
        """Values of the dials at these levels."""
        return [dial.levels[level] for dial, level in zip(self.dials, levels, strict=True)]

    def plan_at(self, values: Sequence[Any]) -> Plan:
        """The stages with the dials at these values."""
        plan: Plan = []
        for position, (name, given) in enumerate(self.plan):
            own = {dial.name: value for dial, value in zip(self.dials, values, strict=True) if dial.stage == position}
            plan.append((name, {**given, **own}))
        return plan

    def standing(self, plan: Plan) -> Standing:
        """The model that a plan makes."""
        current, path, kept = self.start, "", {}
        for name, values in plan:
            path += f"{name}{sorted(values.items())}"
            if path not in self.made:
                self.made[path] = current.through(name, values)
            current = kept[path] = self.made[path]
        self.made = kept  # of other plans only what this one shares
        return current

    def at(self, values: Sequence[Any]) -> Point | None:
        """Try a candidate; None where a compressor refuses it."""
        plan = self.plan_at(values)
        try:
            standing = self.standing(plan)
        except ModelProblem:
            return None
        found = run_over(standing.loaded.model, standing.context)
        change = standing.change(self.expected, found)
        size = stored_bytes(standing.loaded, self.config.output.dtype)
        turned: dict[str, dict[str, Any]] = {}
        for dial, value in zip(self.dials, values, strict=True):
            turned.setdefault(self.plan[dial.stage][0], {})[dial.name] = value
        point = Point(turned, standing.loaded.parameters, size, self._share(standing, size), change)
        self.points.append(point)
        self.run.reporter.info(f"{_words(turned)}: {point.share:.1%} of {self.budget.quantity}, {change:.4g} nats")
        return point

    def _share(self, standing: Standing, size: int) -> float:
        if self.budget.quantity == "parameters":
            return standing.loaded.parameters / self.start.loaded.parameters
        if self.budget.quantity == "bytes":
            return size / self.bytes
        return _latency_share(self.start, standing, self.run)


def _latency_share(before: Standing, after: Standing, run: Run) -> float:
    """Median time of a pass by that of the whole model, in turns, on the first calibration batch."""
    task = before.context.task
    views: dict[str, dict[int, Any]] = {}
    for name, standing in (("before", before), ("after", after)):
        batch = (standing.context.batches or standing.probes)[0]
        views[name] = {1: {key: value for key, value in batch.items() if key != "labels"}}
    models: dict[str, torch.nn.Module] = {"before": before.loaded.model, "after": after.loaded.model}
    timed = latency(task, models, views, _REPEATS, run.device)
    return timed["after"][1]["median_ms"] / timed["before"][1]["median_ms"]


def _words(settings: dict[str, dict[str, Any]]) -> str:
    """`width ffn=0.5 heads=1`."""
    return ", ".join(
        " ".join([name, *(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())])
        for name, values in settings.items()
    )


def search(start: Standing, config: RunConfig, run: Run) -> Found:
    """Settings that meet the budget.

    Args:
        start: The whole model, with a memo in its context.
        config: Gives the stages, the budget and the notches.
        run: Context.

    Raises:
        UsageProblem: there is nothing to turn, or no setting meets the budget.
    """
    assert config.search.budget is not None
    budget = parse_budget(config.search.budget)
    state = _Search(start, stages(config), budget, config, run)
    levels, turned = [0] * len(state.dials), None
    current = state.at(state.values(levels))
    while current is not None and current.share > budget.share:
        current.taken = True
        steps = [step for number in range(len(levels)) if (step := _next(state, levels, number, current))]
        if not steps:
            raise UsageProblem(
                f"--budget {config.search.budget}: {config.method_name} cannot leave less than {current.share:.1%}",
                hint="more methods, such as vocab for embeddings, or width with all its settings open",
            )
        base = current
        turned, level, current = min(steps, key=lambda step: _price(base, step[2]))
        levels[turned] = level
    if current is None:
        raise ModelProblem(f"--budget: {config.method_name} cannot work on '{start.loaded.ref}'")
    values = state.values(levels)
    if turned is not None and state.dials[turned].numeric:
        values, current = _bisect(state, values, turned, levels[turned], current)
    current.taken = True
    return Found(state.plan_at(values), state.points, config.search.budget)


def _price(before: Point, after: Point) -> float:
    """Change of the outputs for each share saved."""
    return (after.divergence - before.divergence) / (before.share - after.share)


def _next(state: _Search, levels: Sequence[int], number: int, current: Point) -> tuple[int, int, Point] | None:
    """The first further notch of a dial that saves something: dial, level, candidate; None without one."""
    for level in range(levels[number] + 1, len(state.dials[number].levels)):
        tried = list(levels)
        tried[number] = level
        point = state.at(state.values(tried))
        if point is not None and point.share < current.share - _LEAST:
            return number, level, point
    return None


def _bisect(state: _Search, values: list[Any], number: int, level: int, current: Point) -> tuple[list[Any], Point]:
    """Turn a dial back between its last two levels, as far as the budget allows."""
    low, high = values[number], state.dials[number].levels[level - 1]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        tried = list(values)
        tried[number] = middle
        point = state.at(tried)
        if point is not None and point.share <= state.budget.share:
            low, values, current = middle, tried, point
        else:
            high = middle
    return values, current
