"""Sampling in batches with key/value caches: from one model, or from a student that its teacher repairs.

In interleaved sampling (SKD) the student proposes each token; it stays if it is among the K largest
raw logits of the teacher, else a draw from the teacher replaces it. Every draw belongs to a row and a
position of the generated text, so the block form (the student drafts some tokens, the teacher scores
them in one pass, what follows the first rejected one is thrown away) gives the tokens of a loop over
single tokens, whatever the size of the blocks or of the batch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


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
        """Probabilities [..., vocabulary], float64."""
        if self.temperature == 0:
            return nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        found = (logits.double() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, order = found.sort(stable=True, dim=-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            found = torch.zeros_like(found).scatter(-1, order, ordered.masked_fill(before >= self.top_p, 0.0))
            found = found / found.sum(-1, keepdim=True)
        return found


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
    """Whether tokens [rows] are among the k largest of the teacher's raw logits [rows, vocabulary]."""
    return (teacher > teacher.gather(-1, tokens[:, None])).sum(-1) < k


def uniforms(keys: Sequence[Sequence[int]], length: int) -> Tensor:
    """Numbers in [0, 1) that depend on the key of their row alone, [rows, 2, length] float64.

    Args:
        keys: One tuple of numbers for each row, such as seed, row and step.
        length: How many positions.
    """
    made = []
    for key in keys:
        digest = hashlib.sha256(repr(tuple(key)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        made.append(torch.rand(2, length, generator=generator, dtype=torch.float64))
    return torch.stack(made)


class Scorer(Protocol):
    """A model with a memory of what it has read."""

    def begin(self, ids: Tensor, mask: Tensor) -> None:
        """Forget everything and read left-padded prompts [rows, n] but for their last token.

        Args:
            ids: Token ids.
            mask: 1 for tokens, 0 for padding.
        """

    def feed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Read tokens [rows, n] at positions [rows, n]; next-token logits [rows, n, vocabulary]."""

    def keep(self, counts: Tensor, fed: int) -> None:
        """Of the last `fed` tokens of each row remember the first `counts` [rows]."""


class CachedModel:
    """A causal language model of transformers with its key/value cache.

    Args:
        model: The model; the caller puts it into eval mode.
        vocabulary: Logits are cut to this many tokens, where heads are padded; None for all.
    """

    def __init__(self, model: nn.Module, vocabulary: int | None = None) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self._cache: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.long)

    def begin(self, ids: Tensor, mask: Tensor) -> None:
        """Read the prompts but for their last token."""
        self._cache = None
        self._mask = mask[:, :0]
        if ids.shape[1] > 1:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            self._read(ids[:, :-1], positions[:, :-1], mask[:, :-1])

    def feed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Read on."""
        return self._read(tokens, positions, torch.ones_like(tokens))

    def _read(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        self._mask = torch.cat([self._mask, mask.to(self._mask.dtype)], 1)
        out = self.model(
            input_ids=tokens,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = out.past_key_values
        logits: Tensor = out.logits
        return logits if self.vocabulary is None else logits[..., : self.vocabulary]

    def keep(self, counts: Tensor, fed: int) -> None:
        """Hide what is rejected in some rows, and cut off what is rejected in all."""
        columns = torch.arange(fed, device=counts.device)
        self._mask[:, self._mask.shape[1] - fed :] = (columns < counts[:, None]).to(self._mask.dtype)
        useless = fed - int(counts.max())
        if useless > 0:
            length = self._mask.shape[1] - useless
            self._cache.crop(-useless)
            self._mask = self._mask[:, :length]


@dataclass(slots=True)
class Generated:
    """Texts as token ids, right-padded.

    Attributes:
        tokens: [rows, longest], with `pad` after the end.
        valid: [rows, longest] bool.
        kept: [rows, longest] bool, whether the first proposal was emitted.
        proposed: [rows, longest] what was proposed.
        teacher_log_prob: [rows, longest] float64, log-probability of the token under the raw teacher; 0 without one.
    """

    tokens: Tensor
    valid: Tensor
    kept: Tensor
    proposed: Tensor
    teacher_log_prob: Tensor


@dataclass(frozen=True, slots=True)
class Interleaving:
    """Settings of sampling.

    Attributes:
        k: Rank up to which the teacher accepts.
        gamma: Tokens the student drafts before the teacher looks.
        student: Distribution of proposals.
        teacher: Distribution of replacements.
        stop: Ids that end a text, and belong to it.
        pad: Id behind the end.
    """

    k: int = 25
    gamma: int = 5
    student: Warp = Warp()
    teacher: Warp = Warp()
    stop: tuple[int, ...] = ()
    pad: int = 0


@torch.no_grad()
def generate(
    student: Scorer, teacher: Scorer | None, ids: Tensor, mask: Tensor, uniform: Tensor, settings: Interleaving
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
    """
    count, _, length = uniform.shape
    uniform = uniform.to(ids.device)
    out = _empty(count, length, settings.pad, ids.device)
    stop = torch.tensor(settings.stop, device=ids.device, dtype=ids.dtype)
    rows = torch.arange(count, device=ids.device)
    prompt = mask.sum(1)
    pending = ids[:, -1]  # the one token that neither model has read
    done = torch.zeros(count, dtype=torch.long, device=ids.device)
    active = torch.ones(count, dtype=torch.bool, device=ids.device)
    for scorer in (student, teacher):
        if scorer is not None:
            scorer.begin(ids, mask)
    while bool(active.any()):
        size = min(settings.gamma, int((length - done[active]).min())) if teacher is not None else 1
        fed, drafts = [pending], []
        for step in range(size):
            at = (done + step).clamp_max(length - 1)
            scores = student.feed(fed[-1][:, None], (prompt - 1 + done + step)[:, None])[:, 0]
            drafts.append(draw(settings.student(scores), uniform[rows, 0, at]))
            fed.append(drafts[-1])
        block = torch.stack(fed[:-1], 1)
        positions = (prompt - 1 + done)[:, None] + torch.arange(size, device=ids.device)
        verdicts = None if teacher is None else teacher.feed(block, positions)
        going, emitted = active.clone(), torch.zeros_like(done)
        for step, proposal in enumerate(drafts):
            at = (done + step).clamp_max(length - 1)
            token, good, log_prob = proposal, torch.ones_like(going), None
            if verdicts is not None:
                raw = verdicts[:, step]
                good = accepted(raw, proposal, settings.k)
                if not bool(good[going].all()):
                    token = torch.where(good, proposal, draw(settings.teacher(raw), uniform[rows, 1, at]))
                log_prob = raw.double().log_softmax(-1).gather(1, token[:, None])[:, 0]
            _write(out, going, at, token, proposal, good, log_prob)
            emitted += going
            pending = torch.where(going, token, pending)
            active &= ~(going & torch.isin(token, stop))
            going = going & good & active
        done += emitted
        active &= done < length
        for scorer in (student, teacher):
            if scorer is not None:
                scorer.keep(emitted, size)
    longest = int(done.max())
    return Generated(*(value[:, :longest] for value in out))


def _empty(count: int, length: int, pad: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Generated`."""
    tokens = torch.full((count, length), pad, dtype=torch.long, device=device)
    valid = torch.zeros_like(tokens, dtype=torch.bool)
    return tokens, valid, valid.clone(), tokens.clone(), torch.zeros_like(tokens, dtype=torch.float64)


def _write(
    out: tuple[Tensor, ...],
    going: Tensor,
    at: Tensor,
    token: Tensor,
    proposal: Tensor,
    good: Tensor,
    log_prob: Tensor | None,
) -> None:
    """Put one token of the rows that go on into place."""
    rows = going.nonzero()[:, 0]
    where = (rows, at[rows])
    tokens, valid, kept, proposed, likely = out
    tokens[where], valid[where], kept[where], proposed[where] = token[rows], True, good[rows], proposal[rows]
    if log_prob is not None:
        likely[where] = log_prob[rows]
