"""What attention modules see on real inputs: queries, keys and values, joined to the lengths asked."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kdtool.attention._base import Call
from kdtool.patching import interface
from kdtool.patching.interface import Seen
from kdtool.patching.layers import Site, through_interface


@dataclass(slots=True)
class Captured:
    """Real rows of one module, one after the other; rows of several inputs are joined.

    Attributes:
        scale: Factor of the logits.
        causal: Whether a query sees earlier keys only.
        window: Keys further away are not seen; None without a window.
        longest: Keys in the longest single call.
    """

    scale: float
    causal: bool
    window: int | None
    longest: int = 0
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], [], []))

    @property
    def length(self) -> int:
        """Positions there are, of queries and of keys."""
        return min(sum(part.shape[1] for part in parts) for parts in self.parts)

    def add(self, seen: Seen) -> None:
        """Keep what a call saw, without padding."""
        self.longest = max(self.longest, seen.k.shape[2])
        mask = seen.call.key_mask
        for parts, rows in zip(self.parts, (seen.q, seen.k, seen.v), strict=True):
            same = mask is not None and rows.shape[2] == mask.shape[1]
            for i in range(rows.shape[0]):
                one = rows[i].detach().float()
                parts.append(one[:, mask[i]] if same and mask is not None else one)

    def at(self, length: int) -> tuple[Tensor, Tensor, Tensor, Call]:
        """The first `length` rows: q [1, Hq, length, d], k and v [1, Hkv, length, .], and the call."""
        q, k, v = (torch.cat(parts, 1)[None, :, :length].contiguous() for parts in self.parts)
        return q, k, v, Call(self.scale, causal=self.causal)


@torch.no_grad()
def capture(
    model: nn.Module, sites: Sequence[Site], runs: Iterable[Callable[[], object]], wanted: int
) -> list[Captured]:
    """Run a model on real inputs until every module that can be patched has seen `wanted` positions.

    Args:
        model: The model, in eval mode.
        sites: Its attention modules, from `find_sites`; those with a reason are passed over.
        runs: Forward passes, as many as it takes.
        wanted: Positions.

    Returns:
        What each open site saw, in the order of the sites; less than `wanted` where the inputs end.
    """
    kept: dict[int, Captured] = {}
    for site in sites:
        if site.reason is None:
            call = next(seen.call for seen in site.calls if seen.reason is None)
            kept[id(site.module)] = Captured(call.scale, call.causal, call.window)

    def note(seen: Seen) -> None:
        found = kept.get(id(seen.module))
        if found is None or seen.reason is not None:
            return
        found.window = seen.call.window if found.window is None else found.window
        if found.length < wanted:
            found.add(seen)

    with through_interface(model), interface.watching(note):
        for run in runs:
            run()
            if all(found.length >= wanted for found in kept.values()):
                break
    return list(kept.values())
