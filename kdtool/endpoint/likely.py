"""The likeliest tokens at each place of a row of tokens, read from what a server says of it.

A row is sent as token ids and comes back with the log-probabilities of the likeliest tokens at each of its places
(`echo` of `/completions`). Tokens are named by their ids where the server knows how to, else by their texts.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from kdtool.endpoint.protocol import Ask, Choice, Sampling, Token
from kdtool.endpoint.reference import EndpointRef
from kdtool.errors import EndpointProblem, ModelProblem

_ID = "token_id:"
_LEAST = 2.0**-20
"""Least mass of all other tokens: what is smaller cannot be told from the rounding of what the server sends."""
_LOWEST = -1e4
"""Least log-probability that is kept; float16 has room for it."""
_MOST = 1.01
"""Largest sum of the probabilities of some tokens, with rounding."""
_DIGITS = 12
"""More are no id."""
_EDGES = "\u2581\u0120 "
"""What tokenizers write for the space before a word, which servers may leave out."""
_UNREADABLE = "\ufffd"
_AS_IDS = "start the server with --return-tokens-as-token-ids (vLLM), so that it names tokens by their ids"


class Scores:
    """Asks for rows, and turns what comes back into what a cache of likely tokens holds.

    Args:
        reference: Address and model, for messages.
        tokenizer: Of the rows.
        k: How many tokens to keep at each place.

    Attributes:
        few: Places at which the server gave fewer, so far.
        places: All places read so far.
    """

    def __init__(self, reference: EndpointRef, tokenizer: Any, k: int) -> None:
        self.reference, self.tokenizer, self.k = reference, tokenizer, k
        self.vocabulary = len(tokenizer)
        self.few = self.places = 0
        self._known: dict[str, int] = {}

    @property
    def sampling(self) -> Sampling:
        """How rows are asked about; servers refuse to write no token at all."""
        return Sampling(max_tokens=1, temperature=0.0, top_logprobs=self.k, echo=True, as_ids=True)

    @property
    def texts(self) -> Sampling:
        """The same for the texts of a row's tokens."""
        return Sampling(max_tokens=1, temperature=0.0, top_logprobs=1, echo=True)

    @staticmethod
    def ask(ids: Sequence[int]) -> Ask:
        """The question about a row."""
        return Ask([int(token) for token in ids])

    def check(self, choice: Choice, ids: Sequence[int]) -> None:
        """See by the texts of a row's tokens that they are the same tokens to the server.

        Raises:
            EndpointProblem: it gives nothing back.
            ModelProblem: most of them have other texts.
        """
        there = [token.text for token in self._row(choice, ids)]
        raw = self.tokenizer.convert_ids_to_tokens(list(ids))
        pairs = list(zip(there, raw, self._decoded(ids), strict=True))
        readable = [pair for pair in pairs if not pair[0].startswith(_ID) and _UNREADABLE not in pair[0] + pair[2]]
        other = [
            (name, token)
            for name, token, text in readable
            if name.strip(_EDGES) not in (token.strip(_EDGES), text.strip(_EDGES))
        ]
        if 2 * len(other) > len(readable):
            name, token = other[0]
            raise ModelProblem(
                f"{self.reference.model} has other tokens than the student",
                why=f"what is '{token}' here is '{name}' there",
                hint="choose a student with the tokenizer of the endpoint's model",
            )

    def read(self, choice: Choice, ids: Sequence[int], chosen: np.ndarray) -> dict[str, np.ndarray]:
        """What a cache holds of a row: `values` and `ids` [units, k], and `rest` [units].

        Where the server gives fewer than k tokens, values of -inf fill up, with the id of the likeliest token.

        Args:
            choice: The answer.
            ids: Token ids [n] of the row.
            chosen: [n - 1] bool, which of the tokens after the first are units.

        Raises:
            EndpointProblem: no log-probabilities, or none that can be read.
            ModelProblem: they are of other tokens.
        """
        row = self._row(choice, ids)
        wanted = np.flatnonzero(chosen) + 1
        values = np.full((len(wanted), self.k), -np.inf)
        names = np.empty((len(wanted), self.k), dtype=np.int32)
        rest = np.empty(len(wanted))
        for unit, place in enumerate(wanted):
            best, rest[unit] = self._place(row[place])
            names[unit] = best[0][0]
            for rank, (token, value) in enumerate(best):
                names[unit, rank], values[unit, rank] = token, value
            self.few += len(best) < self.k
        self.places += len(wanted)
        return {"values": values.astype(np.float16), "ids": names, "rest": rest.astype(np.float32)}

    def _row(self, choice: Choice, ids: Sequence[int]) -> list[Token]:
        """The row's own tokens, without what was written after them."""
        found, size = choice.tokens, len(ids)
        if len(found) <= 1 < size:
            raise EndpointProblem(
                f"the endpoint {self.reference.url} gives no log-probabilities of a prompt",
                why="it does not know `echo` with `logprobs` in /completions",
                hint="vllm serve knows them",
            )
        named = [(token.text, own) for token, own in zip(found, ids, strict=False) if token.text.startswith(_ID)]
        if len(found) not in (size, size + 1) or any(text != f"{_ID}{own}" for text, own in named):
            raise ModelProblem(
                f"{self.reference.model} gives back {max(0, len(found) - 1)} tokens for a row of {size}, or others",
                why="it does not take the student's tokens as they are",
                hint="choose a student with the tokenizer of the endpoint's model",
            )
        return found[:size]

    def _place(self, token: Token) -> tuple[list[tuple[int, float]], float]:
        """The k likeliest tokens of a place, and the log of the mass of all others."""
        ranked = [(self._id(name), value) for name, value in token.top[: self.k]]
        # ids beyond the tokenizer are padding of the server's head: some of the others
        best = [(own, max(value, _LOWEST)) for own, value in ranked if own < self.vocabulary and value > -math.inf]
        mass = sum(math.exp(min(value, 1.0)) for _, value in best)  # logits may be large
        if not mass <= _MOST or len({own for own, _ in best}) < max(1, len(best)):
            raise EndpointProblem(
                f"the endpoint {self.reference.url} gives no log-probabilities of likely tokens",
                why=f"those of {len(best)} tokens, or of some of them twice, add up to {mass:.3g}" if best else None,
                hint="vllm serve gives them with --logprobs-mode raw_logprobs, its default",
            )
        return best, -math.inf if len(best) == self.vocabulary else math.log(max(1.0 - mass, _LEAST))

    def _id(self, name: str) -> int:
        """The id of a token as the server names it."""
        found = self._known.get(name)
        if found is None:
            number = name.removeprefix(_ID)
            plain = number != name and number.isascii() and number.isdigit() and len(number) < _DIGITS
            found = int(number) if plain else self._by_text(name)
            self._known[name] = found
        return found

    def _by_text(self, text: str) -> int:
        """The one token that reads so.

        Raises:
            EndpointProblem: there is none, or several.
        """
        found = self._texts.get(text, set())
        if len(found) != 1:
            raise EndpointProblem(
                f"the endpoint {self.reference.url} names tokens by their texts",
                why=f"{len(found) or 'none'} of the student's tokens read '{text}'",
                hint=_AS_IDS,
            )
        return next(iter(found))

    @cached_property
    def _texts(self) -> dict[str, set[int]]:
        """Texts, and tokens as the tokenizer writes them, to ids."""
        made: dict[str, set[int]] = {}
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        for text, own in zip(self._decoded(list(vocabulary.values())), vocabulary.values(), strict=True):
            made.setdefault(text, set()).add(own)
        for raw, own in vocabulary.items():
            made.setdefault(raw, set()).add(own)
        return made

    def _decoded(self, ids: Sequence[int]) -> list[str]:
        """The text of each token by itself."""
        found: list[str] = self.tokenizer.batch_decode(
            [[int(token)] for token in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return found
