"""What a run is to measure, checked before any work."""

import importlib.util

from kdtool import gates
from kdtool.data.examples import DataSplits
from kdtool.errors import UsageProblem, nearest
from kdtool.metrics import compared
from kdtool.metrics.exact_answer import RULES
from kdtool.registry import METRICS
from kdtool.sections import RunConfig
from kdtool.tasks._base import Task


def check_metrics(config: RunConfig, task: Task) -> None:
    """Refuse metrics that the task does not have, and gates on what is not measured, before any work.

    Raises:
        UsageProblem: the first of them.
    """
    beside_teacher = config.teacher.model is not None
    measured = config.eval.metrics or [name for name in task.metrics if beside_teacher or compared(name) != "models"]
    for name in measured:
        _check_metric(name, task, config)
    made_up = dict.fromkeys(measured, 1.0)
    beside = made_up if beside_teacher else {}
    for gate in gates.parse_gates(config.eval.fail_under):
        gates.check(gate, made_up, beside, beside)
    gates.check_drops(config.patch.max_drop, made_up, made_up)


def _check_metric(name: str, task: Task, config: RunConfig) -> None:
    """Refuse one metric.

    Raises:
        UsageProblem: unknown, of another kind of task, in want of a teacher or of a library.
    """
    fitting = ("logits",) * task.classifies + ("texts",) * task.writes + ("models",)
    known = [*(n for n in task.metrics if not compared(n)), *(n for n in METRICS.names() if compared(n) in fitting)]
    if task.classifies:
        METRICS.check(name.replace("_", "-"))
    if name.replace("_", "-") not in known:
        raise UsageProblem(f"{task.name} has no metric '{name}'", hint=f"metrics: {', '.join(known)}")
    if compared(name) == "models" and config.teacher.model is None:
        raise UsageProblem(f"metric '{name}' compares with a teacher, and the run has none", hint="name one: --teacher")
    wanted = METRICS.info(name.replace("_", "-")).facts.get("library") if compared(name) else None
    if wanted and importlib.util.find_spec(wanted) is None:
        raise UsageProblem(f"metric '{name}' needs {wanted}, which is not installed", hint="pip install 'kdtool[eval]'")


def check_responses(config: RunConfig, data: DataSplits) -> None:
    """Refuse metrics of generated texts where the data has none to compare with, and unknown rules for answers.

    Raises:
        UsageProblem: the first of them.
    """
    named = [name for name in config.eval.metrics or () if compared(name) == "texts"]
    if named and not {"response", "messages"} & set(data.roles):
        raise UsageProblem(
            f"metric '{named[0]}' compares responses, and the data has none",
            hint="name their column: --set data.prompt=COLUMN data.response=COLUMN",
        )
    if config.eval.answers not in RULES:
        raise UsageProblem(f"eval.answers: no rule '{config.eval.answers}'", hint=nearest(config.eval.answers, RULES))
