"""Several methods at once: their terms summed, each with its own weight, from one forward pass.

Terms are given as `--set method.terms=[kd:1,rkd:0.5]`, or with settings of their own in a file:

    method:
      name: combine
      terms:
        - kd:1
        - {name: rkd, weight: 0.5, angle_weight: 20, ramp: 0.2}

The weight multiplies the terms as the method itself weights them; `delay` and `ramp` of a term let
it set in later. The cross-entropy is added once, with `ce_weight`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from kdtool.config import check_plugin_values
from kdtool.data.examples import Examples
from kdtool.errors import ConfigProblem
from kdtool.methods import _terms
from kdtool.models import Loaded
from kdtool.registry import METHODS
from kdtool.tasks._base import Batch, Task


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """Hyper-parameters."""

    terms: list[Any] | None = None
    """Methods and weights: NAME:WEIGHT, or mappings with name, weight and settings."""


def parse_term(item: Any) -> tuple[str, float, dict[str, Any]]:
    """Name, weight and settings of one entry of `terms`.

    Raises:
        ConfigProblem, UsageProblem: not of a known form, or an unknown method or setting.
    """
    if isinstance(item, str):
        name, _, text = item.partition(":")
        values: dict[str, Any] = {"name": name.strip(), "weight": text.strip() or 1}
    elif isinstance(item, Mapping) and len(item) == 1 and "name" not in item:
        # YAML reads `kd: 1` inside a list as a mapping
        ((name, weight),) = item.items()
        values = {"name": name, "weight": weight}
    elif isinstance(item, Mapping) and "name" in item:
        values = dict(item)
    else:
        raise ConfigProblem(f"method.terms: {item!r} is no term", hint="write kd:1, or {name: kd, weight: 1, ...}")
    name = METHODS.check(str(values.pop("name")))
    try:
        weight = float(values.pop("weight", 1))
    except (TypeError, ValueError):
        raise ConfigProblem(f"method.terms: the weight of {name} is no number") from None
    if weight < 0:
        raise ConfigProblem(f"method.terms: the weight of {name} is negative")
    return name, weight, check_plugin_values(METHODS.info(name), values, f"method.terms.{name}")


class Method(_terms.TermMethod):
    """Several methods at once: their terms summed, each with its own weight."""

    paper: ClassVar[str] = "the terms' own papers"
    golden: ClassVar[str] = "checked against the sum of its terms in tests/methods/test_combine.py"
    tasks: ClassVar[frozenset[str]] = frozenset(
        {
            "text-classification",
            "image-classification",
            "audio-classification",
            "tabular-classification",
            "causal-lm",
            "seq2seq-lm",
            "masked-lm",
        }
    )
    mixes: ClassVar[bool] = True

    def __init__(self, config: Config, student: Loaded, teachers: Sequence[Loaded], task: Task) -> None:
        super().__init__(config, student, teachers, task)
        self.weights: list[float] = []
        self.names: list[str] = []
        members: list[_terms.TermMethod] = []
        if not config.terms:
            raise ConfigProblem("combine needs terms", hint="--set method.terms=[kd:1,logit-mse:0.5]")
        for item in config.terms:
            name, weight, values = parse_term(item)
            kind = METHODS.get(name)
            if not issubclass(kind, _terms.TermMethod) or name == "combine" or not kind.combinable:
                raise ConfigProblem(f"method.terms: {name} cannot be combined", why="it is not just a sum of terms")
            if task.name not in kind.tasks:
                raise ConfigProblem(f"method.terms: {name} does not fit {task.name}")
            member = kind(METHODS.build_config(name, {"ce_weight": 0.0} | values), student, teachers, task)
            del member.student  # one student, owned by this method alone
            members.append(member)
            self.weights.append(weight)
            self.names.append(name)
        self.members = nn.ModuleList(members)
        self.student_taps = tuple(dict.fromkeys(tap for m in members for tap in m.student_taps))
        self.teacher_taps = tuple(dict.fromkeys(tap for m in members for tap in m.teacher_taps))
        self.batchwise = any(m.batchwise for m in members)  # type: ignore[misc] # a fact of this combination
        self.mixes = all(m.mixes for m in members)  # type: ignore[misc]
        self.needs_rows = any(m.needs_rows for m in members)  # type: ignore[misc]
        self.reads_teacher = any(m.reads_teacher for m in members)  # type: ignore[misc]

    @classmethod
    def chunk(cls, config: Any) -> int | None:
        """The smallest block of the members, if all of them have measures."""
        found = []
        for item in config.terms or ():
            name, _, values = parse_term(item)
            found.append(METHODS.get(name).chunk(METHODS.build_config(name, values)))
        return None if None in found or not found else min(filter(None, found), default=0)

    def cautions(self, epochs: float) -> Sequence[str]:
        """Those of all members."""
        members = (member for member in self.members if isinstance(member, _terms.TermMethod))
        return [message for member in members for message in member.cautions(epochs)]

    def build(self, student: _terms.Side, teacher: _terms.Side | None, data: Examples) -> None:
        """Let every member make its helpers."""
        all_members: list[Any] = list(self.members)
        for member in all_members:
            member.build(student, teacher, data)

    def terms(
        self, student: _terms.Side, teacher: _terms.Side | None, labels: Tensor, batch: Batch, progress: float
    ) -> list[_terms.Term]:
        """All terms of all members, their names prefixed with the method's."""
        found = []
        all_members: list[Any] = list(self.members)
        for name, weight, member in zip(self.names, self.weights, all_members, strict=True):
            factor = weight * _terms.ramped(progress, member.config.delay, member.config.ramp)
            for term in member.terms(student, teacher, labels, batch, progress):
                found.append(_terms.Term(f"{name}.{term.name}", factor * term.weight, term.value))
        return found

    def measures(self, progress: float) -> list[_terms.Measured] | None:
        """All terms of all members as measures, if each member's are."""
        found = []
        all_members: list[Any] = list(self.members)
        for name, weight, member in zip(self.names, self.weights, all_members, strict=True):
            own = member.measures(progress)
            if own is None:
                return None
            factor = weight * _terms.ramped(progress, member.config.delay, member.config.ramp)
            found += [replace(one, name=f"{name}.{one.name}", weight=factor * one.weight) for one in own]
        return found
