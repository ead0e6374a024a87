"""Returns of token rewards, for policy gradients."""

import torch
from torch import Tensor

_MASKED = 1e-4  # what a token that does not count adds to the length, as published


def returns(rewards: Tensor, mask: Tensor, gamma: float, normalise: bool = True) -> Tensor:
    """Discounted sums of what follows each token: R_t = sum over k >= t of gamma^(k-t) r_k.

    Args:
        rewards: r [rows, length], 0 where the mask is.
        mask: [rows, length], true for tokens that count.
        gamma: Discount in [0, 1].
        normalise: Divide by the equally discounted number of tokens; without it the sum keeps the published
            weights gamma^k, counted from the start of the text.
    """
    if gamma == 0:
        return rewards
    lengths = torch.where(mask.bool(), 1.0, _MASKED).to(rewards.dtype)
    found, size = torch.zeros_like(rewards), torch.zeros_like(rewards)
    total, length = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        total, length = rewards[:, t] + gamma * total, lengths[:, t] + gamma * length
        found[:, t], size[:, t] = total, length
    if normalise:
        return found / size
    return found * gamma ** torch.arange(rewards.shape[1], device=rewards.device, dtype=rewards.dtype)
