"""Comparing distributions over classes, as sums over units.

Every function here takes logits [units, classes], works in float32 whatever the input, and returns
the sum over units as a scalar that carries the gradient of its first argument. `_tokens` holds the
divergences of language models with hand-written gradients, `_chunked` the same from hidden states,
`_top_k` the same with a teacher of whom only the likeliest tokens are known, `_sinkhorn` a distance
between sets of outputs.
"""

from torch import Tensor
from torch.nn import functional

from kdtool.divergences._chunked import Measure, Teacher, compare, compare_all, held, likeliest
from kdtool.divergences._heads import Adapter, Head, head_of
from kdtool.divergences._sinkhorn import Sinkhorn, cost, shortlist, sinkhorn_distance, sinkhorn_rows
from kdtool.divergences._tokens import KINDS, Divergence, divergence, precise
from kdtool.divergences._top_k import TopK
from kdtool.divergences._universal import Matched, Universal

__all__ = [
    "KINDS",
    "Adapter",
    "Divergence",
    "Head",
    "Matched",
    "Measure",
    "Sinkhorn",
    "Teacher",
    "TopK",
    "Universal",
    "compare",
    "compare_all",
    "cost",
    "cross_entropy",
    "divergence",
    "forward_kl",
    "head_of",
    "held",
    "likeliest",
    "precise",
    "shortlist",
    "sinkhorn_distance",
    "sinkhorn_rows",
    "squared_error",
    "standardize",
]


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(p_teacher || p_student) at temperature T, summed over units.

    Hinton, Vinyals and Dean (2015), section 2: gradients scale with 1/T^2, so T^2 keeps the weight
    of the term independent of T.

    Args:
        student: Student logits [units, classes].
        teacher: Teacher logits [units, classes], detached by the caller.
        temperature: T > 0.
    """
    log_p = functional.log_softmax(teacher.float() / temperature, dim=-1)
    log_q = functional.log_softmax(student.float() / temperature, dim=-1)
    return functional.kl_div(log_q, log_p, reduction="sum", log_target=True) * temperature**2


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with hard labels [units], optionally smoothed towards uniform, summed over units."""
    return functional.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)


def standardize(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Rows shifted to mean 0 and scaled to standard deviation 1 (Sun et al., 2024, equation 8).

    Args:
        logits: [units, classes]
        eps: Added to the standard deviation; keeps constant rows finite.
    """
    z = logits.float()
    return (z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True, unbiased=False) + eps)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over classes of the squared logit difference, summed over units."""
    return (student.float() - teacher.float()).square().mean(-1).sum()
