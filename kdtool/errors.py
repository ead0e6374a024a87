"""The one family of errors that kdtool raises on purpose, each with its exit code."""

from collections.abc import Iterable
from difflib import get_close_matches

_LONGEST = 600
"""Characters of a message: what a user gave may be quoted in it, and may be anything."""


def _one_line(text: str) -> str:
    """Text as one printable line of bounded length."""
    if len(text) > _LONGEST:
        text = text[: _LONGEST - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class KdtoolError(Exception):
    """An expected failure: one line what, optionally one line why, and a hint.

    Args:
        message: What went wrong, in one line.
        why: The cause where it is known, in one line.
        hint: What to do next, naming kdtool's own options.
    """

    exit_code = 1
    code = "failed"

    def __init__(self, message: str, *, why: str | None = None, hint: str | None = None) -> None:
        self.message = _one_line(message)
        self.why = None if why is None else _one_line(why)
        self.hint = None if hint is None else _one_line(hint)
        super().__init__(self.message)

    def as_dict(self) -> dict[str, str | None]:
        """The `error` object of `--json` output."""
        text = self.message if self.why is None else f"{self.message} ({self.why})"
        return {"code": self.code, "message": text, "hint": self.hint}


class UsageProblem(KdtoolError):
    """The command line asks for something that cannot be (exit 2)."""

    exit_code = 2
    code = "usage"


class ConfigProblem(UsageProblem):
    """A configuration file or a `--set` override is wrong (exit 2)."""

    code = "config"


class DataProblem(UsageProblem):
    """The data cannot be used as asked: missing, empty, corrupt, wrong columns (exit 2)."""

    code = "data"


class ModelProblem(UsageProblem):
    """A model cannot be used as asked: missing or corrupt files, unsafe weights, no fit (exit 2)."""

    code = "model"


class OutputProblem(KdtoolError):
    """The result cannot be written: no permission, no space (exit 1)."""

    code = "output"


class TrainingProblem(KdtoolError):
    """Training broke down: loss not finite, a worker died (exit 1)."""

    code = "training"


class QualityProblem(KdtoolError):
    """A gate was missed or a saved model does not reproduce itself (exit 3); the artefact is kept."""

    exit_code = 3
    code = "quality"


class HubProblem(KdtoolError):
    """The Hub or the network refused (exit 4)."""

    exit_code = 4
    code = "hub"


class EndpointProblem(HubProblem):
    """A server that should write texts cannot be reached, or refuses (exit 4)."""

    code = "endpoint"


class MemoryProblem(KdtoolError):
    """Out of memory (exit 5)."""

    exit_code = 5
    code = "memory"


class Interrupted(KdtoolError):
    """Stopped by the user; a checkpoint was written first (exit 130)."""

    exit_code = 130
    code = "interrupted"


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Return `did you mean a, b?`, or the list of what is known when nothing is near.

    Args:
        name: What the user wrote.
        known: The valid names.
        limit: How many near names to give at most.
    """
    names = sorted(known)
    near = get_close_matches(name, names, n=limit, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(near)}?"
    if not names:
        return "there are none."
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"known: {shown}."
