"""The same texts in the tokens of two tokenizers, and where both end a token at the same place.

Each text, or each prompt with its response, is a row of its own for both models. Of the tokens that count, those
that end where tokens of the other tokenizer end, too, close a group: the shortest stretch of text that is whole
tokens in both. The first tokens of a group are predicted from the same text by both models.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdtool.data.examples import Examples
from kdtool.errors import DataProblem
from kdtool.run import Run
from kdtool.sections import DataSection
from kdtool.tasks._base import TEACHER_PREFIX
from kdtool.tasks._prompts import COUNTED, REFERENCE, Piece, has_prompts, pieces_of

GROUPS = "groups"
"""Column: [groups, 4] int64, first and behind-last token of each group, of the student and of the teacher."""

_METASPACE = "\u2581"


@dataclass(frozen=True, slots=True)
class _Side:
    """A row in the tokens of one tokenizer.

    Attributes:
        ids: [tokens]
        counted: [tokens] bool
        starts: Of each piece that counts, its first token.
        ends: Of each piece that counts, characters of it that are through with each of its tokens; -1 where a
            character goes on in the next token.
    """

    ids: np.ndarray
    counted: np.ndarray
    starts: list[int]
    ends: list[np.ndarray]


def encode_apart(
    rows: Examples, tokenizers: Sequence[Any], limits: Sequence[int], settings: DataSection, run: Run
) -> Examples:
    """Rows in the tokens of the student, with those of the teacher beside them, and their groups.

    Args:
        rows: Columns `text`; or `prompt` and `response`, perhaps `input`; or `messages`.
        tokenizers: The student's and the teacher's.
        limits: Longest row of each in tokens.
        settings: Separator and chat template.
        run: Hears what was left out.

    Raises:
        DataProblem: a tokenizer does not tell which characters its tokens stand for, or no row is left.
    """
    for tokenizer in tokenizers:
        if not getattr(tokenizer, "is_fast", False):
            raise DataProblem(
                "a tokenizer does not tell which characters its tokens stand for", hint="use models with fast ones"
            )
    parted = [_pieces(rows, tokenizer, settings) for tokenizer in tokenizers]
    columns: dict[str, list[Any]] = {}
    for pieces in zip(*(one for one, _ in parted), strict=True):
        both = [
            _side(own, tokenizer, begin, limit)
            for own, tokenizer, (_, begin), limit in zip(pieces, tokenizers, parted, limits, strict=True)
        ]
        groups = _groups(both, [[piece for piece in own if piece.counts] for own in pieces])
        if not len(groups):
            continue
        for prefix, side in zip(("", f"{TEACHER_PREFIX}0."), both, strict=True):
            columns.setdefault(f"{prefix}input_ids", []).append(side.ids)
            columns.setdefault(f"{prefix}{COUNTED}", []).append(side.counted)
        columns.setdefault(GROUPS, []).append(groups)
        columns.setdefault(REFERENCE, []).append(next(piece.text for piece in pieces[0] if piece.counts))
    if not columns:
        raise DataProblem("no row has text that both tokenizers can be compared on", hint="check the data's columns")
    left = len(columns[GROUPS])
    if left < len(rows):
        run.reporter.warn(f"{len(rows) - left} of {len(rows)} rows left out, which have nothing to compare")
    return Examples(columns, np.array([len(ids) for ids in columns["input_ids"]], dtype=np.int64))


def _pieces(rows: Examples, tokenizer: Any, settings: DataSection) -> tuple[list[list[Piece]], list[int]]:
    """Pieces of each row and the tokens before the first; a plain text is a piece that counts."""
    if has_prompts(rows):
        return pieces_of(rows, tokenizer, settings)
    begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    return [[Piece(text, True, True)] for text in rows.columns["text"]], begin


def _side(pieces: Sequence[Piece], tokenizer: Any, begin: Sequence[int], limit: int) -> _Side:
    """One row in the tokens of one tokenizer, cut on the right."""
    ids, counted = list(begin), [False] * len(begin)
    starts, ends = [], []
    for piece in pieces:
        made = tokenizer(
            piece.text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        own, offsets = list(made["input_ids"]), np.array(made["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        through = offsets[:, 1].copy()
        through[:-1][offsets[1:, 0] < through[:-1]] = -1  # the next token is of the same character
        if piece.counts and piece.ends and tokenizer.eos_token_id is not None:
            own.append(int(tokenizer.eos_token_id))
            through = np.append(through, len(piece.text) + 1)
        if piece.counts:
            starts.append(len(ids))
            ends.append(through)
        ids += own
        counted += [piece.counts] * len(own)
    if counted:
        counted[0] = False  # nothing comes before it
    return _Side(np.array(ids[:limit], dtype=np.int64), np.array(counted[:limit], dtype=bool), starts, ends)


def _groups(both: Sequence[_Side], pieces: Sequence[Sequence[Piece]]) -> np.ndarray:
    """Groups of a row, [groups, 4], each within a piece and the limits, of tokens that all count."""
    found: list[tuple[int, int, int, int]] = []
    for number, texts in enumerate(zip(*pieces, strict=False)):
        shared = _shared(*(piece.text for piece in texts))
        whole = all(len(piece.text) == shared for piece in texts)
        places = []
        for side in both:
            ends = side.ends[number]
            last = ends[-1:] == len(texts[0].text) + 1  # the end of the text, a token in both
            good = (ends > 0) & ((ends <= shared) | np.append(np.zeros(max(0, len(ends) - 1), bool), last & whole))
            places.append({int(end): index for index, end in enumerate(ends) if good[index]})
        begin = [side.starts[number] for side in both]
        for end in sorted(places[0].keys() & places[1].keys()):
            stop = [side.starts[number] + place[end] + 1 for side, place in zip(both, places, strict=True)]
            inside = all(b < s <= len(side.ids) for b, s, side in zip(begin, stop, both, strict=True))
            if inside and all(side.counted[b:s].all() for b, s, side in zip(begin, stop, both, strict=True)):
                found.append((begin[0], stop[0], begin[1], stop[1]))
            begin = stop
    return np.array(found, dtype=np.int64).reshape(-1, 4)


def _shared(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    if one == other:
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers mean the same by every id that both have."""
    left, right = ({number: token for token, number in tokenizer.get_vocab().items()} for tokenizer in (one, other))
    return all(left[number] == right[number] for number in left.keys() & right.keys())


def matched(student: Any, teacher: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the student's and the teacher's tokens that stand for the same bytes, [matches] each."""
    left, right = (_bytes_of(tokenizer) for tokenizer in (student, teacher))
    pairs = sorted((left[key], right[key]) for key in left.keys() & right.keys())
    ends = (student.eos_token_id, teacher.eos_token_id)
    if None not in ends:
        pairs = [(a, b) for a, b in pairs if a != ends[0] and b != ends[1]] + [ends]
    found = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _bytes_of(tokenizer: Any) -> dict[bytes, int]:
    """What each token stands for, to its id; special tokens, which stand for no text, are left out."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    kinds = {step.get("type") for step in [decoder, *decoder.get("decoders", ())]}
    alphabet = _alphabet() if "ByteLevel" in kinds else {}
    special = set(tokenizer.all_special_ids)
    found: dict[bytes, int] = {}
    for token, number in tokenizer.get_vocab().items():
        if number in special:
            continue
        if alphabet and all(letter in alphabet for letter in token):
            key = bytes(alphabet[letter] for letter in token)
        elif "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x"):
            key = bytes([int(token[3:5], 16)])
        else:
            key = token.replace(_METASPACE, " ").encode()
        found.setdefault(key, int(number))
    return found


def _alphabet() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes: printable ones as they are, others from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
