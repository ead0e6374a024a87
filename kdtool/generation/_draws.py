"""From logits and numbers in [0, 1) to tokens."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_NUCLEUS = 1024
"""Most likely tokens among which a nucleus is looked for before all are sorted."""


@dataclass(frozen=True, slots=True)
class Warp:
    """How logits become the distribution that is drawn from.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Keeps the most likely tokens whose probabilities first reach this sum.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        """Probabilities [rows, vocabulary], float64."""
        if self.temperature == 0:
            return nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        found = (logits.double() / self.temperature).softmax(-1)
        if self.top_p < 1:
            found = found.masked_fill(~_nucleus(found, self.top_p), 0.0)
            found = found / found.sum(-1, keepdim=True)
        return found

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Tokens [rows] from logits [rows, vocabulary]; see `draw`."""
        return logits.argmax(-1) if self.temperature == 0 else draw(self(logits), uniform)


def _nucleus(found: Tensor, top_p: float) -> Tensor:
    """Which of the probabilities [rows, vocabulary] stay; among equal ones those of smaller ids."""
    largest = found.topk(min(_NUCLEUS, found.shape[-1])).values
    if found.shape[-1] > _NUCLEUS and bool((largest.sum(-1) < top_p).any()):
        largest = found.sort(-1, descending=True).values
    inside = largest.cumsum(-1) - largest < top_p
    least = largest.gather(-1, inside.sum(-1, keepdim=True) - 1)
    equal = found == least
    room = (inside & (largest == least)).sum(-1, keepdim=True)
    return (found > least) | (equal & (equal.cumsum(-1) <= room))


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Smallest index whose cumulative probability exceeds `uniform`.

    Args:
        probabilities: [rows, vocabulary]
        uniform: [rows] in [0, 1).
    """
    total = probabilities.cumsum(-1)
    # rounding may leave the last sum below a uniform close to 1, hence the bound below it
    bound = torch.minimum(uniform, total[:, -1] * (1 - 1e-12))
    return torch.searchsorted(total, bound[:, None].contiguous(), right=True)[:, 0].clamp_max(total.shape[-1] - 1)


def accepted(teacher: Tensor, tokens: Tensor, k: int) -> Tensor:
    """Whether tokens [...] are among the k largest of the teacher's raw logits [..., vocabulary]."""
    return (teacher > teacher.gather(-1, tokens[..., None])).sum(-1) < k


def uniforms(keys: Sequence[Sequence[int]], length: int) -> Tensor:
    """Numbers in [0, 1) that depend on the key of their row and on their position alone.

    Args:
        keys: One tuple of numbers for each row, such as seed, row and step.
        length: How many positions; more of them leave those before as they are.

    Returns:
        [rows, 2, length] float64.
    """
    made = []
    for key in keys:
        digest = hashlib.sha256(repr(tuple(key)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        made.append(torch.rand(length, 2, generator=generator, dtype=torch.float64).T)
    return torch.stack(made)
