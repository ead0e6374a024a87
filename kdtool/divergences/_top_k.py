"""A teacher of whom only the likeliest tokens are kept, and the mass of all others as one outcome."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdtool.divergences._tokens import LEAST, Divergence, normalize_


@dataclass(frozen=True, slots=True)
class TopK:
    """The k likeliest tokens of each position, and all others as one outcome.

    A divergence over these k + 1 outcomes is no larger than over all tokens (data processing inequality), and
    equals it where k is the size of the vocabulary.

    Attributes:
        log_probs: Log-probabilities [tokens, k] at the temperature of the divergence; where fewer tokens are known,
            -inf fills up.
        ids: Their token ids [tokens, k], different in a row; what fills up has that of any other.
        rest: Log-probability [tokens] of all other tokens together; -inf where there are none.
    """

    log_probs: Tensor
    ids: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float = 1.0) -> "TopK":
        """What is kept of logits [tokens, vocabulary], in float32, or float64 for float64."""
        z = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32, copy=True)
        likely = normalize_(z.div_(temperature))
        best, ids = z.topk(min(k, z.shape[1]), -1)
        return cls(best, ids, likely.scatter_(1, ids, 0.0).sum(-1).log())

    def __getitem__(self, part: slice | Tensor) -> "TopK":
        return TopK(self.log_probs[part], self.ids[part], self.rest[part])

    def __len__(self) -> int:
        return len(self.ids)

    def apart(self, student: Tensor, which: Divergence) -> tuple[Tensor, Tensor]:
        """Value of each row and its gradient by the student's logits, which are overwritten.

        Args:
            student: Logits [rows, vocabulary], float32 or float64; those of the teacher's tokens among them.
            which: The divergence over k + 1 outcomes.

        Returns:
            Values [rows] and gradients [rows, vocabulary].
        """
        ids, absent = self.ids.long(), self.log_probs.isneginf()
        if which.temperature != 1.0:
            student.div_(which.temperature)
        q = normalize_(student)
        own = q.gather(1, ids).masked_fill_(absent, 0.0)
        # summed, not 1 - the kept: that would lose small masses to rounding
        rest = q.scatter_(1, ids, 0.0).sum(-1, keepdim=True)
        log_q = torch.cat([student.gather(1, ids).masked_fill_(absent, LEAST), rest.log().clamp_min_(LEAST)], 1)
        log_p = torch.cat([self.log_probs, self.rest[:, None]], 1).to(student.dtype)
        value, slope = which.apart(log_q, torch.cat([own, rest], 1), log_p, normalize_(log_p))
        # a logit of the rest moves its outcome by the logit's share of it
        # added, not put: what fills up has the id of another
        gradient = q.mul_(slope[:, -1:] / rest.clamp_min(torch.finfo(q.dtype).tiny)).scatter_add_(1, ids, slope[:, :-1])
        return value, gradient if which.temperature == 1.0 else gradient.div_(which.temperature)
