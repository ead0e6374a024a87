"""What feature methods share: matching stages, positions without padding, vectors, full precision.

Legend of shapes: N examples, C channels, P positions (pixels, patches or tokens), B batch.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdtool.errors import ConfigProblem
from kdtool.features import as_map, as_vector, stages_of
from kdtool.methods._terms import Side, TermMethod
from kdtool.models import Loaded
from kdtool.tasks._base import Batch, Task, view_of

P = ParamSpec("P")
_HALF = (torch.float16, torch.bfloat16)


def _raised(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value


def full_precision(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Run a loss outside autocast, with tensors of half precision raised to float32."""

    @wraps(loss)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        first = next(value for value in args if isinstance(value, Tensor))
        with torch.autocast(first.device.type, enabled=False):
            result: Tensor = loss(*map(_raised, args), **{k: _raised(v) for k, v in kwargs.items()})
        return result

    return call


class PairMethod(TermMethod):
    """Base of methods that compare one activation of each model: `student_tap` and `teacher_tap`."""

    def __init__(self, config: Any, student: Loaded, teachers: Sequence[Loaded], task: Task) -> None:
        super().__init__(config, student, teachers, task)
        self.points = (config.student_tap, config.teacher_tap)
        self.student_taps, self.teacher_taps = (config.student_tap,), (config.teacher_tap,)

    def vectors(self, student: Side, teacher: Side, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both activations as one vector for each example: [N, C_s], [N, C_t]."""
        return vector_of(student, self.points[0], batch), vector_of(teacher, self.points[1], batch, teacher=True)

    def channels(self, student: Side, teacher: Side) -> tuple[int, int]:
        """Channels of both activations."""
        return channels_of(student.taps[self.points[0]]), channels_of(teacher.taps[self.points[1]])


class StagesMethod(TermMethod):
    """Base of methods that compare several stages: `student_taps` and `teacher_taps`, lists or None."""

    tap_prefix = ""
    """`pre:` to take what enters the last ReLU of a stage where no taps are named."""

    def __init__(self, config: Any, student: Loaded, teachers: Sequence[Loaded], task: Task) -> None:
        super().__init__(config, student, teachers, task)
        named = (config.student_taps, config.teacher_taps)
        pair = matched_stages(student.model, teachers[0].model, *named)
        self.student_taps, self.teacher_taps = (
            tuple(points if given else (f"{self.tap_prefix}{point}" for point in points))
            for points, given in zip(pair, named, strict=True)
        )
        self.pairs = list(zip(self.student_taps, self.teacher_taps, strict=True))


def matched_stages(
    student: nn.Module, teacher: nn.Module, student_taps: Sequence[str] | None, teacher_taps: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Names of taps of both models, one pair for each stage, from shallow to deep.

    Args:
        student: The student.
        teacher: The teacher.
        student_taps: As configured; None for as many last stages as both models have.
        teacher_taps: The same.

    Raises:
        ConfigProblem: not equally many on both sides.
    """
    given = next((points for points in (student_taps, teacher_taps) if points is not None), None)
    count = len(given) if given is not None else min(len(stages_of(student)), len(stages_of(teacher)))
    last = [str(number) for number in range(-count, 0)]
    pair = list(student_taps or last), list(teacher_taps or last)
    if len(pair[0]) != len(pair[1]):
        raise ConfigProblem(
            f"{len(pair[0])} student taps, but {len(pair[1])} teacher taps",
            hint="name equally many in method.student_taps and method.teacher_taps",
        )
    return pair


def padding_mask(side: Side, value: Tensor, batch: Batch, teacher: bool) -> Tensor | None:
    """Which positions of a sequence [N, P, C] are real: [N, P], 1 or 0; None where there is no padding.

    Args:
        side: Whose activation it is.
        value: The activation.
        batch: The batch, with the attention mask of the inputs.
        teacher: Whether `side` is the teacher's.
    """
    mask = (view_of(batch, 0) if teacher else batch).get("attention_mask")
    if value.ndim != 3 or mask is None:
        return None
    if mask.shape[1] == value.shape[1]:
        return mask
    # models of recordings shorten their input by convolutions and know by how much
    shorten = getattr(side.model, "_get_feature_vector_attention_mask", None)
    return None if shorten is None else shorten(value.shape[1], mask).to(value.device)


def vector_of(side: Side, point: str, batch: Batch, teacher: bool = False) -> Tensor:
    """A tap as one vector for each example [N, C]: the mean over real positions."""
    value = side.taps[point]
    mask = padding_mask(side, value, batch, teacher)
    if mask is None:
        return as_vector(value)
    weight = mask.unsqueeze(-1).to(value.dtype)
    return (value * weight).sum(1) / weight.sum(1).clamp_min(1)


def flat_of(side: Side, point: str, batch: Batch, teacher: bool = False) -> Tensor:
    """A tap as one long vector for each example [N, C * P], padding set to 0."""
    value = side.taps[point]
    mask = padding_mask(side, value, batch, teacher)
    return (value if mask is None else value * mask.unsqueeze(-1).to(value.dtype)).flatten(1)


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [N, C, H, W], the larger average-pooled to the smaller."""
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    return _pooled(student, size), _pooled(teacher, size)


def _pooled(value: Tensor, size: tuple[int, int]) -> Tensor:
    return value if value.shape[2:] == size else functional.adaptive_avg_pool2d(value, size)


def positions_of(
    student: Side, teacher: Side, points: tuple[str, str], batch: Batch
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A pair of taps position by position: [N, C_s, P], [N, C_t, P] and the mask [N, P] of real positions.

    Raises:
        ConfigProblem: sequences of different lengths, which have no common positions.
    """
    s, t = student.taps[points[0]], teacher.taps[points[1]]
    mask = padding_mask(student, s, batch, False)
    other = padding_mask(teacher, t, batch, True)
    retokenized = "input_ids" in view_of(batch, 0) and view_of(batch, 0) is not batch
    if s.ndim == t.ndim == 3 and s.shape[1] == t.shape[1] and not retokenized:
        return s.transpose(1, 2), t.transpose(1, 2), mask
    if (mask is not None or other is not None) and not s.ndim == t.ndim == 2:
        raise ConfigProblem(
            "student and teacher see sequences of different lengths",
            hint="use pooled taps: --set method.student_tap=pooled --set method.teacher_tap=pooled",
        )
    s, t = same_size(as_map(s), as_map(t))
    return s.flatten(2), t.flatten(2), None


def maps_of(student: Side, teacher: Side, points: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """A pair of taps as maps of one size: [N, C_s, H, W] and [N, C_t, H, W]."""
    return same_size(as_map(student.taps[points[0]]), as_map(teacher.taps[points[1]]))


def channels_of(value: Tensor) -> int:
    """Channels of a tap, whatever its form."""
    return value.shape[-1] if value.ndim == 3 else value.shape[1]


def projection(student: int, teacher: int) -> nn.Conv1d:
    """A trained map of student channels to teacher channels at each position.

    It starts as the identity between equal widths, else at random.
    """
    layer = nn.Conv1d(student, teacher, 1)
    if student == teacher:
        nn.init.dirac_(layer.weight)
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type] # made with a bias
    return layer


def squared_distance(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over channels and real positions of squared differences, summed over examples.

    Args:
        student: [N, C, P]
        teacher: [N, C, P]
        mask: [N, P], or None where all positions are real.
    """
    error = (student - teacher).square().mean(1)
    return mean_over_positions(error, mask).sum()


def mean_over_positions(value: Tensor, mask: Tensor | None) -> Tensor:
    """Means [N] of values [N, P] over real positions."""
    if mask is None:
        return value.mean(1)
    weight = mask.to(value.dtype)
    return (value * weight).sum(1) / weight.sum(1).clamp_min(1)
