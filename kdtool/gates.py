"""Quality bars: `accuracy=0.85`, or relative to the teacher `accuracy.retention=0.97`; torch-free."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdtool.errors import UsageProblem, nearest
from kdtool.registry import METRICS

_OTHER: Mapping[str, bool] = {"loss": False, "perplexity": False, "bits-per-byte": False, "token-accuracy": True}
"""Metrics that tasks compute themselves, and whether higher is better."""

_LOWER = re.compile(
    r"(^|[-/])(loss|perplexity|latency|ms|seconds|time|bytes|parameters|error|diff|eer|wer|cer|nll|ece)([-/]|$)"
)
"""Words in the name of any other metric that say lower is better."""


def _plain(name: str) -> str:
    return name.replace("_", "-")


def _fact(metric: str, fact: str, default: Any) -> Any:
    """A literal of a metric's file, read without importing it."""
    name = _plain(metric)
    return METRICS.info(name).facts.get(fact, default) if name in METRICS.names() else default


def higher_is_better(metric: str) -> bool:
    """True if a larger value is a better one.

    Registered metrics say so themselves; others go by their name (`latency_ms`, `loss`: lower).
    """
    name = _plain(metric)
    return bool(_fact(name, "higher_is_better", _OTHER.get(name, not _LOWER.search(name))))


@dataclass(frozen=True, slots=True)
class Gate:
    """One quality bar.

    Attributes:
        metric: Metric name as the user wrote it.
        kind: `value` bounds the student's metric (from above where lower is better); `retention`
            bounds from below what the student keeps of the teacher.
        bound: The bar; meeting it exactly passes.
    """

    metric: str
    kind: Literal["value", "retention"]
    bound: float

    @property
    def name(self) -> str:
        """As written on the command line: `accuracy` or `accuracy.retention`."""
        return self.metric if self.kind == "value" else f"{self.metric}.retention"

    @property
    def upper(self) -> bool:
        """True if the bar is an upper bound."""
        return self.kind == "value" and not higher_is_better(self.metric)


@dataclass(frozen=True, slots=True)
class GateResult:
    """A gate and what the run reached; an undefined value (nan) misses every gate."""

    name: str
    bound: float
    value: float
    passed: bool
    upper: bool = False

    def __str__(self) -> str:
        sign = ("<=" if self.passed else ">") if self.upper else (">=" if self.passed else "<")
        sign = "is undefined, wanted" if math.isnan(self.value) else sign
        value = "" if math.isnan(self.value) else f"{self.value:.4g} "
        return f"{self.name} {value}{sign} {self.bound:.4g}"


def _bound(item: str, metric: str, kind: str, text: str) -> float:
    try:
        bound = float(text)
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise UsageProblem(f"gate '{item}': '{text}' is not a number", hint="such as --fail-under accuracy=0.85")
    low, high = _fact(metric, "bounds", (None, None)) if kind == "value" else (0.0, None)
    if (low is not None and bound < low) or (high is not None and bound > high):
        limits = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
        advice = f"write {metric}={bound / 100:g}" if high == 1.0 and 1.0 < bound <= 100.0 else None
        raise UsageProblem(f"gate '{item}': {_plain(metric)} is {limits}", hint=advice)
    return bound


def parse_gates(items: Sequence[str], also: Iterable[str] = ()) -> list[Gate]:
    """Read gates as given to `--fail-under`.

    Args:
        items: `METRIC=VALUE` or `METRIC.retention=VALUE`.
        also: Names of metrics, beyond the registered ones, that the run is known to give.

    Raises:
        UsageProblem: not of that form, not a number, out of the metric's range, or an unknown metric.
    """
    known = {_plain(name) for name in (*METRICS.names(), *_OTHER, *also)}
    gates: list[Gate] = []
    for item in items:
        left, sign, text = item.partition("=")
        metric, dot, kind = left.strip().rpartition(".") if "." in left else (left.strip(), "", "value")
        if not sign or not metric:
            raise UsageProblem(f"gate '{item}' is not METRIC=VALUE", hint="such as --fail-under accuracy=0.85")
        if dot and kind != "retention":
            hint = f"write {metric}={text.strip()} or {metric}.retention={text.strip()}"
            raise UsageProblem(f"gate '{item}': unknown '.{kind}'", hint=hint)
        if _plain(metric) not in known:
            hint = f"{nearest(_plain(metric), known)} See: kdtool methods ls"
            raise UsageProblem(f"gate '{item}': unknown metric '{metric}'", hint=hint)
        bound = _bound(item, metric, kind, text.strip())
        gates.append(Gate(metric, "retention" if dot else "value", bound))
    return gates


def _lookup(values: Mapping[str, float], metric: str) -> float | None:
    return next((value for name, value in values.items() if _plain(name) == _plain(metric)), None)


def check(
    gate: Gate,
    metrics_student: Mapping[str, float],
    metrics_teacher: Mapping[str, float] | None,
    retention: Mapping[str, float],
) -> GateResult:
    """Hold a run against a gate.

    Args:
        gate: The bar.
        metrics_student: Metrics of the student.
        metrics_teacher: Metrics of the teacher; None or empty where there is none.
        retention: Share of the teacher's metrics that the student keeps; lacks undefined ratios.

    Raises:
        UsageProblem: the run did not compute the metric, or has no teacher to compare with.
    """
    value = _lookup(metrics_student, gate.metric)
    if value is None and not (gate.kind == "retention" and _lookup(retention, gate.metric) is not None):
        raise UsageProblem(
            f"gate '{gate.name}={gate.bound:g}': the run does not measure {gate.metric}",
            why=f"it measures {', '.join(sorted(metrics_student)) or 'nothing'}",
            hint=f"add it with --set eval.metrics=[{gate.metric}], or gate one of those",
        )
    if gate.kind == "retention":
        value = _lookup(retention, gate.metric)
        if value is None and not metrics_teacher:
            raise UsageProblem(
                f"gate '{gate.name}={gate.bound:g}' compares with a teacher, and the run has none",
                hint=f"give --teacher, or bound the value itself: {gate.metric}=...",
            )
    value = math.nan if value is None else float(value)
    passed = value <= gate.bound if gate.upper else value >= gate.bound
    return GateResult(gate.name, gate.bound, value, passed, gate.upper)


def parse_drops(items: Sequence[str]) -> list[tuple[str, float]]:
    """Read what `--max-drop` was given: metrics, and how much worse each may become.

    Raises:
        UsageProblem: not METRIC=VALUE, not a number from 0 on, or an unknown metric.
    """
    known = {_plain(name) for name in (*METRICS.names(), *_OTHER)}
    drops: list[tuple[str, float]] = []
    for item in items:
        metric, sign, text = (part.strip() for part in item.partition("="))
        if not sign or not metric:
            raise UsageProblem(f"--max-drop {item}: not METRIC=VALUE", hint="such as --max-drop accuracy=0.005")
        if _plain(metric) not in known:
            raise UsageProblem(f"--max-drop {item}: unknown metric '{metric}'", hint=nearest(_plain(metric), known))
        try:
            bound = float(text)
        except ValueError:
            bound = math.nan
        if not (math.isfinite(bound) and bound >= 0.0):
            raise UsageProblem(f"--max-drop {item}: '{text}' is not a number from 0 on")
        drops.append((metric, bound))
    return drops


def check_drops(items: Sequence[str], after: Mapping[str, float], before: Mapping[str, float]) -> list[GateResult]:
    """Hold a changed model against the one it was made from.

    Args:
        items: As given to `--max-drop`.
        after: Metrics of the changed model.
        before: Metrics of the other one.

    Raises:
        UsageProblem: a metric was not measured.
    """
    results = []
    for metric, bound in parse_drops(items):
        new, old = _lookup(after, metric), _lookup(before, metric)
        if new is None or old is None:
            raise UsageProblem(
                f"--max-drop {metric}={bound:g}: the run does not measure {metric}",
                why=f"it measures {', '.join(sorted(after)) or 'nothing'}",
                hint=f"add it with --set eval.metrics=[{metric}]",
            )
        worse = old - new if higher_is_better(metric) else new - old
        # a difference of two sums of fractions: the last bits are not the user's
        results.append(GateResult(f"{metric}.drop", bound, worse, worse <= bound + 1e-9, upper=True))
    return results


@dataclass(frozen=True, slots=True)
class Budget:
    """What a smaller model may have of a larger one.

    Attributes:
        quantity: What is counted.
        share: Largest share that may be left.
    """

    quantity: Literal["parameters", "bytes", "latency"]
    share: float


def parse_budget(text: str) -> Budget:
    """Read `parameters=0.5`, `bytes=0.25` or `latency=0.5`.

    Raises:
        UsageProblem: not of that form.
    """
    quantity, _, value = text.partition("=")
    try:
        share = float(value)
    except ValueError:
        share = math.nan
    if quantity not in ("parameters", "bytes", "latency") or not 0.0 < share < 1.0:
        raise UsageProblem(
            f"--budget {text}: not of the form parameters=0.5",
            hint="parameters, bytes or latency, and a share above 0 and below 1",
        )
    return Budget(quantity, share)  # type: ignore[arg-type] # checked above
