"""Policy gradients on texts (MiniLLM): rewards, their returns, the clipped objective.

With p the teacher, q the student and b what the text was sampled from, all for tokens given what is before them:

    r_t = log p(y_t) - log q(y_t)                                the reward, constant
    R_t = sum over k >= t of gamma^(k-t) r_k / sum of gamma^(k-t)
    L_t = - min(w_t A_t, clip(w_t, 1 - c, 1 + c) A_t),  w_t = q(y_t) / b(y_t),  A_t = R_(t+1)

The token's own reward is left out of A_t: its expectation has an exact gradient, that of KL(q||p) (Gu et al. 2023,
equation 4), which is computed over the whole vocabulary instead.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdtool.divergences import Divergence, Head, compare


class Pieces(NamedTuple):
    """What the loss of texts is made of.

    Attributes:
        policy: Sum of L_t, carries the gradient.
        single_step: Sum of KL(q||p), carries the gradient.
        returns: R_t [rows, length].
        reward: r_t [rows, length], 0 where a token does not count.
        log_q: [tokens] log q(y_t) of the tokens that count, detached.
    """

    policy: Tensor
    single_step: Tensor
    returns: Tensor
    reward: Tensor
    log_q: Tensor


def returns(rewards: Tensor, mask: Tensor, gamma: float, normalise: bool = True, masked: float = 0.0) -> Tensor:
    """Discounted sums of what follows each token: R_t = sum over k >= t of gamma^(k-t) r_k.

    Args:
        rewards: r [rows, length], 0 where the mask is.
        mask: [rows, length], true for tokens that count.
        gamma: Discount in [0, 1].
        normalise: Divide by the equally discounted number of tokens; without it the sum keeps the published
            weights gamma^k, counted from the start of the text.
        masked: What a token that does not count adds to the length; published code has 1e-4, by which padding
            would change the loss.
    """
    if gamma == 0:
        return rewards
    lengths = torch.where(mask.bool(), 1.0, masked).to(rewards.dtype)
    found, size = torch.zeros_like(rewards), torch.zeros_like(rewards)
    total, length = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        total, length = rewards[:, t] + gamma * total, lengths[:, t] + gamma * length
        found[:, t], size[:, t] = total, length
    if normalise:
        return found / size.clamp_min(torch.finfo(size.dtype).tiny)
    return found * gamma ** torch.arange(rewards.shape[1], device=rewards.device, dtype=rewards.dtype)


def _picked(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    logits = head.logits(hidden)
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return exact.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def log_probs(hidden: Tensor, head: Head, labels: Tensor, rows: int = 64) -> Tensor:
    """Log-probabilities [tokens] of labels [tokens] from hidden states [tokens, width].

    Carries the gradient; logits are made again in the backward pass, so that only those of a chunk are ever held.
    """
    parts = [
        checkpoint(_picked, hidden[start : start + rows], head, labels[start : start + rows], use_reentrant=False)
        for start in range(0, len(hidden), rows)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0)


def clipped(log_q: Tensor, log_b: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """L_t [tokens]; log_q carries the gradient."""
    ratio = (log_q - log_b).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def pieces(
    student: tuple[Tensor, Head],
    teacher: tuple[Tensor, Head],
    ids: Tensor,
    mask: Tensor,
    log_b: Tensor | None = None,
    gamma: float = 1.0,
    normalise: bool = True,
    clip: float = 0.2,
    masked: float = 0.0,
) -> Pieces:
    """Compare what student and teacher say of texts.

    Args:
        student: Hidden states [rows, length, width] that predict `ids`, and the head.
        teacher: The same of the teacher, without gradient.
        ids: y [rows, length].
        mask: [rows, length] bool, true for tokens that count.
        log_b: [tokens] log b(y_t) of the tokens that count; None if the student wrote them.
        gamma: Discount of rewards.
        normalise: Divide returns by their length.
        clip: c.
        masked: See `returns`.
    """
    own, there, labels = student[0][mask], teacher[0][mask], ids[mask]
    log_q = log_probs(own, student[1], labels)
    with torch.no_grad():
        log_p = log_probs(there, teacher[1], labels)
    reward = log_q.new_zeros(ids.shape).masked_scatter(mask, log_p - log_q.detach())
    found = returns(reward, mask, gamma, normalise, masked)
    advantage = torch.cat([found[:, 1:], torch.zeros_like(found[:, :1])], 1)
    advantage = torch.where(mask.roll(-1, 1), advantage, 0.0)[mask]  # nothing follows the last token
    before = log_q.detach() if log_b is None else log_b.to(log_q.dtype)
    policy = clipped(log_q, before, advantage, clip).sum()
    single, _, _ = compare(own, student[1], (there, teacher[1]), None, Divergence("reverse-kl"))
    return Pieces(policy, single, found, reward, log_q.detach())
