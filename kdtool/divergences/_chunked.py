"""Divergences of language models from hidden states, some rows at a time.

Logits of a chunk are made, compared, turned into the gradient by hidden states and head, and dropped,
so nothing of size [tokens, vocabulary] outlives its chunk. Callers drop positions that do not count first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdtool.divergences._heads import Head, Piece
from kdtool.divergences._tokens import Divergence, normalize_
from kdtool.divergences._top_k import TopK

Teacher = tuple[Tensor, Head] | Tensor | TopK
"""Hidden states and head, logits [tokens, vocabulary], or what is kept of the most likely tokens."""

_LOGITS = {"cpu": 10 * 2**20}
"""Most logits of one model in a chunk: on a CPU 40 MiB, elsewhere enough to keep the device busy."""
_MANY = 2**26
_ROWS = {"cpu": 176}
"""Most tokens in a chunk: on a CPU as many as bring matrix products to their speed."""
_IN_CACHE = 2**17
"""Logits that a CPU goes over several times at once, so that they stay in its cache."""
_WORKING, _COUPLED = 4, 8
"""Tensors of the size of the logits gone over at once that a divergence makes, and a distance between blocks."""


class Measure(Protocol):
    """What compares rows of logits: a divergence, or a distance between blocks of rows."""

    @property
    def aligned(self) -> bool:
        """Whether columns of both logits are the same tokens."""

    @property
    def block(self) -> int | None:
        """Most rows that make one problem; None where each row stands for itself."""

    def rows(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Values [rows] and gradient [rows, vocabulary]; may overwrite the logits."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """Constants of a comparison."""

    terms: Sequence[tuple[Any, float]]
    scale: float
    cap: float | None
    ce_weight: float
    rows: int
    vocabulary: int
    """Ids from here on are padding of a head, which the measures do not see."""
    kind: torch.dtype
    """Format of the matrix products."""
    exact: torch.dtype
    """Format of everything else."""
    narrow: bool
    """Whether chunks are gone over in bands that stay in a processor's cache."""


class _Side:
    """A model's half of a comparison: makes logits of rows, and takes the gradient of them back."""

    def __init__(
        self, pieces: Sequence[Piece], bias: Tensor | None, plan: _Plan, scale: float, cap: float | None
    ) -> None:
        self.pieces = [(given.to(plan.kind), matrix.to(plan.kind)) for given, matrix in pieces]
        self.bias, self.scale, self.cap, self.plan = bias, scale, cap, plan
        self.space = pieces[0][1].new_empty(0, dtype=plan.exact)

    def logits(self, part: slice) -> Tensor:
        """[rows, vocabulary] in a memory that the next call overwrites."""
        (given, matrix), *others = self.pieces
        size = len(given[part])
        if len(self.space) < size:
            self.space = self.space.new_empty(min(self.plan.rows, len(given)), len(matrix))
        z = self.space[:size]
        if z.dtype == given.dtype:
            torch.mm(given[part], matrix.T, out=z)
        else:
            z.copy_(given[part] @ matrix.T)
        for more, up in others:
            z.add_(more[part] @ up.T)
        if self.bias is not None:
            z.add_(self.bias)
        if self.scale != 1.0:
            z.mul_(self.scale)
        return z if self.cap is None else z.div_(self.cap).tanh_().mul_(self.cap)


class _Gradients:
    """Where gradients of the student's inputs, matrices and bias gather."""

    def __init__(self, side: _Side, wanted: Sequence[bool], originals: Sequence[Piece], bias: Tensor | None) -> None:
        plan = side.plan
        self.side, self.kinds = side, [one.dtype for piece in originals for one in piece]
        self.found: list[Tensor | None] = []
        for (given, matrix), inner, outer in zip(side.pieces, wanted[1::2], wanted[2::2], strict=True):
            self.found.append(torch.empty_like(given) if inner else None)
            self.found.append(torch.zeros_like(matrix, dtype=plan.exact) if outer else None)
        self.bias = torch.zeros_like(bias, dtype=plan.exact) if bias is not None and wanted[0] else None
        self.bias_kind = None if bias is None else bias.dtype

    def add(self, part: slice, d_z: Tensor) -> None:
        """Take in the gradient by the logits of some rows; scales it in place."""
        if self.side.scale != 1.0:
            d_z.mul_(self.side.scale)
        if self.bias is not None:
            self.bias += d_z.sum(0)
        d_z = d_z.to(self.side.plan.kind)
        for number, (given, matrix) in enumerate(self.side.pieces):
            inner, outer = self.found[2 * number : 2 * number + 2]
            if inner is not None:
                torch.mm(d_z, matrix, out=inner[part])
            if outer is not None and outer.dtype == d_z.dtype:
                outer.addmm_(d_z.T, given[part])
            elif outer is not None:
                outer += d_z.T @ given[part]

    def all(self) -> list[Tensor | None]:
        """Bias first, then inputs and matrices of the pieces, each in the format of the tensor it belongs to."""
        bias = None if self.bias is None else self.bias.to(self.bias_kind)
        pieces = [None if one is None else one.to(kind) for one, kind in zip(self.found, self.kinds, strict=True)]
        return [bias, *pieces]


class _Compare(torch.autograd.Function):
    """ce_weight * cross-entropy + weighted measures, gradients made along with the value."""

    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, teacher: Teacher | None, labels: Tensor | None, bias: Tensor | None, *flat: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(flat[0].device.type, enabled=False):
            pieces = list(zip(flat[::2], flat[1::2], strict=True))
            side = _Side(pieces, bias, plan, plan.scale, plan.cap)
            gradients = _Gradients(side, ctx.needs_input_grad[3:], pieces, bias)
            other = _teacher_side(teacher, plan)
            sums = flat[0].new_zeros(1 + len(plan.terms), dtype=plan.exact)
            for start in range(0, len(flat[0]), plan.rows):
                part = slice(start, start + plan.rows)
                z = side.logits(part)
                theirs = other.logits(part) if isinstance(other, _Side) else _part(other, part)
                own = _part(labels, part)
                for band in _bands(plan, *z.shape):
                    _band(plan, z[band], _part(theirs, band), _part(own, band), sums)
                gradients.add(part, z)
        ctx.save_for_backward(*gradients.all())
        weights = sums.new_tensor([plan.ce_weight, *(weight for _, weight in plan.terms)])
        ctx.mark_non_differentiable(sums)
        return (sums * weights).sum(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # in place, since a copy has the size of the head; torch then refuses a second pass over the same graph
        return None, None, None, *(one if one is None else one.mul_(grad) for one in ctx.saved_tensors)


def _teacher_side(teacher: Teacher | None, plan: _Plan) -> Any:
    """The teacher as something that makes logits; as it is where its logits, or the best of them, are there."""
    if not isinstance(teacher, tuple):
        return teacher
    hidden, head = teacher
    with torch.no_grad():
        return _Side(head.pieces(hidden), head.bias, plan, head.scale, head.cap)


def _part(whole: Any, part: slice) -> Any:
    return None if whole is None else whole[part]


def _bands(plan: _Plan, rows: int, vocabulary: int) -> Iterator[slice]:
    """Parts of a chunk that are gone over at once."""
    step = max(1, _IN_CACHE // vocabulary) if plan.narrow else rows
    yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _band(plan: _Plan, z: Tensor, teacher: Tensor | TopK | None, labels: Tensor | None, sums: Tensor) -> None:
    """Add the values of some rows to the sums, and put the gradient by their logits in the place of these."""
    slope = None if plan.cap is None else (z / plan.cap).square_().neg_().add_(1)
    alone = len(plan.terms) + bool(plan.ce_weight) == 1
    gradients = []
    for number, (measure, weight) in enumerate(plan.terms, 1):
        mine = z[:, : plan.vocabulary]
        value, found = _apart(measure, mine if alone else mine.clone(), teacher)
        sums[number] += value.sum()
        gradients.append((found, weight))
    if labels is not None and plan.ce_weight:
        found = normalize_(z)
        sums[0] -= z.gather(1, labels[:, None]).sum()
        found.scatter_add_(1, labels[:, None], found.new_full((len(labels), 1), -1.0))
        gradients.append((found, plan.ce_weight))
    width = 0
    for found, weight in gradients:
        narrow = z[:, : found.shape[1]]
        if width:
            narrow[:, :width].add_(found[:, :width], alpha=weight)
            torch.mul(found[:, width:], weight, out=narrow[:, width:])
        else:
            torch.mul(found, weight, out=narrow)
        width = found.shape[1]
    z[:, width:].zero_()
    if slope is not None:
        z.mul_(slope)


def _apart(measure: Any, mine: Tensor, teacher: Tensor | TopK | None) -> tuple[Tensor, Tensor]:
    """Values and gradient of one measure; overwrites the student's logits, and leaves the teacher's."""
    if isinstance(teacher, TopK):
        return teacher.apart(mine, measure)
    assert teacher is not None
    theirs = teacher[:, : mine.shape[1]] if measure.aligned else teacher
    found: tuple[Tensor, Tensor] = measure.rows(mine, theirs.to(mine.dtype, copy=True))
    return found


def _plan_of(
    hidden: Tensor,
    head: Head,
    terms: Sequence[tuple[Measure, float]],
    ce_weight: float,
    rows: int | None,
    vocabulary: int | None,
) -> _Plan:
    """What a comparison needs besides its tensors; see `compare_all`."""
    device, size = hidden.device.type, len(head.weight)
    blocks = [measure.block for measure, _ in terms if measure.block]
    block = min(blocks) if blocks else None
    autocast = torch.is_autocast_enabled(device)
    return _Plan(
        terms=tuple(terms),
        scale=head.scale,
        cap=head.cap,
        ce_weight=ce_weight,
        rows=rows if rows and block is None else _rows(device, size, block),
        vocabulary=min(size, vocabulary or size),
        kind=torch.get_autocast_dtype(device) if autocast else hidden.dtype,
        exact=torch.float64 if hidden.dtype == torch.float64 else torch.float32,
        narrow=device == "cpu" and block is None,
    )


def _rows(device: str, vocabulary: int, block: int | None) -> int:
    """Most tokens in a chunk."""
    return block or max(1, min(_ROWS.get(device, _MANY), _LOGITS.get(device, _MANY) // vocabulary))


def held(
    tokens: int, vocabulary: int, others: int, device: str, block: int | None = None, autocast: bool = False
) -> int:
    """Bytes of logits, and of what is made of them, that `compare_all` holds at most in float32.

    Args:
        tokens: How many count.
        vocabulary: Rows of the student's head.
        others: Rows of the teacher's; 0 without one, or where its logits are there already.
        device: Type of the device.
        block: Of the measures.
        autocast: Whether matrix products are in 16 bits.
    """
    rows = min(tokens, _rows(device, vocabulary, block))
    at_once = rows * max(vocabulary, others)
    working = _WORKING * (min(at_once, _IN_CACHE) if device == "cpu" else at_once)
    if block is not None:
        working = _COUPLED * at_once
    return 4 * (rows * (vocabulary + others) + working) + (2 * at_once if autocast else 0)


def compare_all(
    hidden: Tensor,
    head: Head,
    teacher: Teacher | None,
    labels: Tensor | None,
    terms: Sequence[tuple[Measure, float]],
    ce_weight: float = 0.0,
    rows: int | None = None,
    vocabulary: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compare a student with a teacher and with labels by several measures, without holding all logits.

    Args:
        hidden: The student's hidden states [tokens, width]; only tokens that count.
        head: The student's head.
        teacher: Hidden states [tokens, its width] and head, logits, or the k likeliest tokens of a teacher.
        labels: Token ids [tokens].
        terms: Measures and their weights.
        ce_weight: Of the cross-entropy with the labels, which sees the whole head.
        rows: Tokens in a chunk (default: by the size of the vocabulary).
        vocabulary: Size that student and teacher share (default: the student's head).

    Returns:
        The weighted sum over tokens, which carries the gradient, and the unweighted sums of the cross-entropy and
        each measure, which do not; in float32, or float64 for float64 hidden states.
    """
    plan = _plan_of(hidden, head, terms, ce_weight if labels is not None else 0.0, rows, vocabulary)
    if isinstance(teacher, tuple):
        shared = all(measure.aligned for measure, _ in terms)
        teacher = (teacher[0].detach(), teacher[1].cut(plan.vocabulary) if shared else teacher[1])
    flat = [one for piece in head.pieces(hidden) for one in piece]
    total, sums = _Compare.apply(plan, teacher, labels, head.bias, *flat)  # type: ignore[no-untyped-call]
    return total, sums


@torch.no_grad()
def likeliest(hidden: Tensor, head: Head, k: int, temperature: float = 1.0) -> TopK:
    """The k likeliest tokens of each position, without holding all logits.

    Args:
        hidden: Hidden states [tokens, width].
        head: The head.
        k: How many to keep.
        temperature: Divides the logits.
    """
    plan = _plan_of(hidden, head, [], 0.0, None, None)
    with torch.autocast(hidden.device.type, enabled=False):
        side = _Side(head.pieces(hidden), head.bias, plan, head.scale, head.cap)
        starts = range(0, len(hidden), plan.rows)
        found = [TopK.of(side.logits(slice(start, start + plan.rows)), k, temperature) for start in starts]
    return TopK(*(torch.cat([getattr(one, name) for one in found]) for name in ("log_probs", "ids", "rest")))


def compare(
    hidden: Tensor,
    head: Head,
    teacher: Teacher | None = None,
    labels: Tensor | None = None,
    which: Measure | None = None,
    weight: float = 1.0,
    ce_weight: float = 0.0,
    rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare a student with a teacher by one measure, and with labels; see `compare_all`.

    Args:
        hidden: The student's hidden states [tokens, width]; only tokens that count.
        head: The student's head.
        teacher: What the teacher says of the same tokens; its vocabulary has the same size.
        labels: Token ids [tokens].
        which: The measure; forward KL by default.
        weight: Of the measure.
        ce_weight: Of the cross-entropy with the labels.
        rows: Tokens in a chunk.

    Returns:
        The weighted sum over tokens, which carries the gradient, and the unweighted sums of cross-entropy and
        divergence, which do not.
    """
    terms: list[tuple[Measure, float]] = [(which or Divergence(), weight)] if teacher is not None and weight else []
    total, sums = compare_all(hidden, head, teacher, labels, terms, ce_weight, rows)
    return total, sums[0], sums[1] if terms else torch.zeros_like(sums[0])
