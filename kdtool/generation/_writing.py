"""The loop over blocks of tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdtool.generation._draws import Warp, accepted
from kdtool.generation._scorers import Scorer

_PLAIN = Warp()
_DRAFTED = 0.5
"""What a drafted token costs, as a share of a pass of the teacher; only the speed depends on it."""
_FORGOTTEN = 0.7
"""What is left, after each block, of the weight of what was accepted before."""


class StopStrings:
    """Where a text ends because it holds one of some strings.

    Args:
        tokenizer: Turns ids into text; what it gives serves this test alone.
        strings: The strings; the token that completes one belongs to the text.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.strings = tuple(strings)

    def _ended(self, ids: Sequence[int]) -> bool:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(string in text for string in self.strings)

    def cut(self, ids: Sequence[int], known: int) -> int | None:
        """How many of the generated `ids` belong to the text; None if no string is complete.

        Args:
            ids: A text so far.
            known: Of so many ids it is known that they hold none.
        """
        if not self.strings or not self._ended(ids):
            return None
        return next((n for n in range(known + 1, len(ids)) if self._ended(ids[:n])), len(ids))


@dataclass(slots=True)
class Generated:
    """Texts as token ids, right-padded.

    Attributes:
        tokens: [rows, longest], with `pad` after the end.
        valid: [rows, longest] bool.
        kept: [rows, longest] bool, whether the first proposal was emitted.
        proposed: [rows, longest] what was proposed.
        log_prob: [rows, longest] float64, the token's log-probability under the raw teacher, or under the writer
            where it writes alone; 0 unless `Interleaving.scored`.
    """

    tokens: Tensor
    valid: Tensor
    kept: Tensor
    proposed: Tensor
    log_prob: Tensor


@dataclass(frozen=True, slots=True)
class Interleaving:
    """Settings of sampling.

    Attributes:
        k: Rank up to which the teacher accepts.
        gamma: The most tokens the student drafts before the teacher looks; fewer where most would be thrown away,
            unless `expected_length` counts blocks.
        student: Distribution of proposals.
        teacher: Distribution of replacements.
        stop: Ids that end a text, and belong to it.
        stop_strings: What else ends a text.
        pad: Id behind the end.
        expected_length: Tokens over which `k` falls to 1, block by block; 0 leaves it.
        scored: Note log-probabilities.
        in_step: Rows are repaired at the same place, and what was written ahead of it is written again; for models
            that need it (see `in_step`).
    """

    k: int = 25
    gamma: int = 5
    student: Warp = _PLAIN
    teacher: Warp = _PLAIN
    stop: tuple[int, ...] = ()
    stop_strings: StopStrings | None = None
    pad: int = 0
    expected_length: int = 0
    scored: bool = False
    in_step: bool = False

    def rank(self, block: int) -> int:
        """K in a block, counted from 0: it falls after the first and then every max(E // k, 1) of them."""
        if not self.expected_length or not block:
            return self.k
        times = (block - 1) // max(self.expected_length // self.k, 1) + 1
        return max(1, self.k - times * max(math.ceil(self.k / self.expected_length), 1))


@torch.no_grad()
def generate(
    student: Scorer,
    teacher: Scorer | None,
    ids: Tensor,
    mask: Tensor,
    uniform: Tensor,
    settings: Interleaving,
    limits: Tensor | None = None,
) -> Generated:
    """Sample from the student, repaired by the teacher where one is given.

    Args:
        student: Proposes.
        teacher: Accepts or replaces; None accepts everything.
        ids: Left-padded prompts [rows, n], each of at least one token.
        mask: 1 for tokens, 0 for padding.
        uniform: [rows, 2, length] as `uniforms` gives: proposals and replacements, by position; `length` is the
            most that is generated.
        settings: Sampling.
        limits: [rows] the most that is generated in each row, at most `length`, which it is by default.
    """
    count, _, length = uniform.shape
    if limits is None:
        limits = torch.full((count,), length)
    scorers = [scorer for scorer in (student, teacher) if scorer is not None]
    for scorer in scorers:
        scorer.begin(ids, mask)
    writing = _Writing(ids, mask, uniform.to(ids.device), settings, limits.to(ids.device), teacher is not None)
    block = 0
    while bool(writing.active.any()):
        size = 1 if teacher is None else min(writing.worthwhile, writing.longest)
        drafts, positions, scores = writing.draft(student, size)
        if teacher is not None:
            fed = torch.cat([writing.pending[:, None], drafts[:, :-1]], 1)
            scores = teacher.feed(fed, positions)
        counts = writing.judge(drafts, scores, None if teacher is None else settings.rank(block))
        for scorer in scorers:
            scorer.keep(counts, size)
        left = writing.leave()
        if left is not None:
            for scorer in scorers:
                scorer.select(left)
        block += 1
    return writing.result()


class _Writing:
    """Texts that are being written, and the rows still at work."""

    def __init__(
        self, ids: Tensor, mask: Tensor, uniform: Tensor, settings: Interleaving, limits: Tensor, repairs: bool
    ) -> None:
        count, _, length = uniform.shape
        self.settings, self.uniform, self.limits = settings, uniform, limits
        self.stop = torch.tensor(settings.stop, device=ids.device, dtype=ids.dtype)
        self.tokens = torch.full((count, length), settings.pad, dtype=torch.long, device=ids.device)
        self.valid = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.kept, self.proposed = (self.valid.clone(), self.tokens.clone()) if repairs else (self.valid, self.tokens)
        self.log_prob = torch.zeros_like(self.tokens, dtype=torch.float64)
        self.rows = torch.arange(count, device=ids.device)
        self.columns = torch.arange(settings.gamma, device=ids.device)
        self.first = mask.sum(1) - 1  # position of the last prompt token
        self.pending = ids[:, -1]  # the one token that no model has read
        self.done = torch.zeros_like(self.first)
        self.active = limits > 0
        self.passed = self.tested = 0.0

    @property
    def longest(self) -> int:
        """The most that a row may still write."""
        return int(((self.limits - self.done) * self.active).max())

    @property
    def worthwhile(self) -> int:
        """Tokens to draft that give most for their time, by how many were accepted lately."""
        gamma, tested = self.settings.gamma, self.tested
        if self.settings.expected_length or not tested:
            return gamma
        rate = min(self.passed / tested, 1 - 1e-6)
        return max(range(1, gamma + 1), key=lambda n: (1 - rate**n) / (1 + _DRAFTED * n))

    def draft(self, student: Scorer, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Proposals [rows, size], the positions of what they follow, and the student's last logits [rows, 1, V]."""
        ahead = self.columns[:size]
        # rows close to their limit draft beyond it in vain: their last place stands for those behind it
        at = torch.minimum(self.done[:, None] + ahead, (self.limits - 1).clamp_min(0)[:, None])
        positions = self.first[:, None] + at
        token, found = self.pending, []
        for step in range(size):
            scores = student.feed(token[:, None], positions[:, step : step + 1])
            token = self.settings.student.draw(scores[:, 0], self.uniform[self.rows, 0, at[:, step]])
            found.append(token)
        return torch.stack(found, 1), positions, scores

    def judge(self, drafts: Tensor, scores: Tensor, k: int | None) -> Tensor:
        """Write what the teacher lets pass and its first replacement.

        Args:
            drafts: [rows, size]
            scores: Logits [rows, size, vocabulary] that judge, and that log-probabilities are of.
            k: Rank up to which a token passes; None lets everything pass.

        Returns:
            How many of the tokens read to remember, [rows]: those written; as many as of any where a row is done.
        """
        room = (self.limits - self.done) * self.active
        tokens, emitted, good = (
            (drafts, room.clamp_max(drafts.shape[1]), None) if k is None else self._repaired(drafts, scores, room, k)
        )
        ends, stopped = torch.isin(tokens, self.stop), torch.zeros_like(self.active)
        if bool(ends.any()):
            emitted = torch.minimum(emitted, ends.long().cummax(1).values.eq(0).sum(1) + 1)
            stopped = (ends & (self.columns[: ends.shape[1]] < emitted[:, None])).any(1)
        if self.settings.stop_strings is not None:
            emitted, stopped = self._cut(tokens, emitted, stopped, self.settings.stop_strings)
        if self.settings.in_step and k is not None:
            least = emitted[self.active].min()
            emitted, stopped = emitted.clamp_max(least), stopped & (emitted <= least)
        row, column = (self.columns[: drafts.shape[1]] < emitted[:, None]).nonzero(as_tuple=True)
        where = (self.rows[row], self.done[row] + column)
        self.tokens[where], self.valid[where] = tokens[row, column], True
        if good is not None:
            self.kept[where], self.proposed[where] = good[row, column], drafts[row, column]
        if self.settings.scored:
            raw = scores[row, column].double()
            self.log_prob[where] = raw.log_softmax(-1).gather(1, tokens[row, column, None])[:, 0]
        last = tokens.gather(1, (emitted - 1).clamp_min(0)[:, None])[:, 0]
        self.pending = torch.where(emitted > 0, last, self.pending)
        self.done = self.done + emitted
        self.active = self.active & ~stopped & (self.done < self.limits)
        return torch.where(self.active, emitted, emitted.max())

    def _repaired(self, drafts: Tensor, scores: Tensor, room: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [rows, size] with the first rejected one replaced, how many of them stay, and which pass."""
        size = drafts.shape[1]
        good = accepted(scores, drafts, k)
        passed = torch.minimum(good.long().cumprod(1).sum(1), room)
        bad = (passed < room.clamp_max(size)).nonzero()[:, 0]
        accepted_now = int(passed.sum())
        self.passed = _FORGOTTEN * self.passed + accepted_now
        self.tested = _FORGOTTEN * self.tested + accepted_now + len(bad)
        tokens = drafts
        if len(bad):
            place = passed[bad]
            uniform = self.uniform[self.rows[bad], 1, self.done[bad] + place]
            tokens = drafts.clone()
            tokens[bad, place] = self.settings.teacher.draw(scores[bad, place], uniform)
        return tokens, torch.minimum((passed + 1).clamp_max(size), room), good

    def _cut(self, tokens: Tensor, emitted: Tensor, stopped: Tensor, strings: StopStrings) -> tuple[Tensor, Tensor]:
        """Rows that hold a stop string end with the token that completes it."""
        emitted, stopped = emitted.clone(), stopped.clone()
        for i in emitted.nonzero()[:, 0].tolist():
            known = int(self.done[i])
            ids = [*self.tokens[self.rows[i], :known].tolist(), *tokens[i, : int(emitted[i])].tolist()]
            end = strings.cut(ids, known)
            if end is not None:
                emitted[i], stopped[i] = end - known, True
        return emitted, stopped

    def leave(self) -> Tensor | None:
        """Drop rows that are done once they are half of those at work; which stay, or None for all."""
        working = int(self.active.sum())
        if not working or 2 * working > len(self.rows):
            return None
        stay = self.active.nonzero()[:, 0]
        for name in ("rows", "first", "pending", "done", "limits", "active"):
            setattr(self, name, getattr(self, name)[stay])
        return stay

    def result(self) -> Generated:
        """All texts, cut to the longest."""
        longest = max(1, int(self.valid.any(0).sum()))
        parts = (self.tokens, self.valid, self.kept, self.proposed, self.log_prob)
        return Generated(*(value[:, :longest] for value in parts))
