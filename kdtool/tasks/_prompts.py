"""Prompts and responses as token ids: what is put around them, what counts, what is cut or left out.

A row is a list of pieces of text, each of which counts or not. Pieces are tokenised one by one, so the
tokens of a prompt are those that it has when a model is asked to go on from it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdtool.data.chats import ANSWERS, Conversation
from kdtool.data.examples import Examples
from kdtool.errors import DataProblem
from kdtool.run import Run
from kdtool.sections import DataSection

COUNTED = "counted"
"""Column beside `input_ids`: [tokens] bool, true where a token is to be predicted."""

REFERENCE = "reference"
"""Column beside them: the text of the response, whole, as metrics compare it."""

_CUT_RESPONSE = 2
"""Where a prompt is cut on the left, its response gets up to the second part of the length."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a row.

    Attributes:
        text: What is tokenised.
        counts: Whether it is to be learnt.
        ends: Whether an end-of-sequence token belongs behind it.
        answer: Of what counts, the response itself, without what a template adds.
    """

    text: str
    counts: bool
    ends: bool = False
    answer: str = ""


@dataclass(slots=True)
class _Tally:
    """What happened to the rows."""

    cut: int = 0
    shortened: int = 0
    too_long: int = 0
    empty: int = 0


def has_prompts(rows: Examples) -> bool:
    """Whether rows are prompts with responses, or conversations, and not plain text."""
    return "prompt" in rows.columns or "messages" in rows.columns


def encode_prompts(rows: Examples, tokenizer: Any, settings: DataSection, limit: int, run: Run) -> Examples:
    """Rows with `input_ids` and `counted`, at most `limit` tokens long; what is cut or left out is said.

    Args:
        rows: Columns `prompt` and `response`, perhaps `input`; or `messages`.
        tokenizer: Its beginning-of-sequence token comes first, its end-of-sequence token last, where it has them.
        settings: Separator, chat template, and what to do with long prompts.
        limit: Longest row in tokens.
        run: Hears what was cut or left out.

    Raises:
        DataProblem: no row is left, or a chat template does not take a conversation.
    """
    pieces, begin = pieces_of(rows, tokenizer, settings)
    texts = [piece.text for row in pieces for piece in row]
    encoded = iter(tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])
    ids, counted, kept, tally = [], [], [], _Tally()
    for number, row in enumerate(pieces):
        made = _joined(row, [next(encoded) for _ in row], begin, tokenizer.eos_token_id)
        fitted = _fitted(*made, limit, len(begin), settings.long_prompts == "cut", tally)
        if fitted is not None:
            ids.append(fitted[0])
            counted.append(fitted[1])
            kept.append(number)
    _report(tally, len(pieces), limit, run)
    if not ids:
        raise DataProblem(
            f"none of {len(pieces)} rows can be used",
            why=f"{tally.too_long} have a prompt of {limit} tokens or more, {tally.empty} have no response",
            hint="--set data.long_prompts=cut, or a larger data.max_length",
        )
    answers = [next(piece.answer for piece in pieces[number] if piece.counts) for number in kept]
    columns: dict[str, Any] = {"input_ids": ids, COUNTED: counted, REFERENCE: answers}
    return Examples(columns, np.array([len(row) for row in ids], dtype=np.int64))


def documents(texts: Sequence[Sequence[int]], begin: Sequence[int], end: int | None, limit: int) -> Examples:
    """Texts as rows of their own of at most `limit` tokens, long ones in parts; all but the first token counts.

    Args:
        texts: Token ids of each text.
        begin: Ids in front of a text.
        end: Id behind it, where there is one.
        limit: Longest row in tokens.

    Raises:
        DataProblem: no text has two tokens.
    """
    whole = [np.array([*begin, *ids, *([] if end is None else [end])], dtype=np.int64) for ids in texts]
    rows = [ids[at : at + limit] for ids in whole for at in range(0, len(ids), limit)]
    rows = [ids for ids in rows if len(ids) > 1]
    if not rows:
        raise DataProblem("the texts are empty", hint="choose another column: --set data.text=COLUMN")
    counted = [np.arange(len(ids)) > 0 for ids in rows]
    return Examples({"input_ids": rows, COUNTED: counted}, np.array([len(ids) for ids in rows], dtype=np.int64))


def pieces_of(rows: Examples, tokenizer: Any, settings: DataSection) -> tuple[list[list[Piece]], list[int]]:
    """The pieces of each row, and the tokens that come before the first.

    Raises:
        DataProblem: the chat template is missing, or does not take a conversation.
    """
    plain = "messages" not in rows.columns
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if plain and settings.chat_template and not has_template:
        raise DataProblem("the tokenizer has no chat template", hint="leave data.chat_template out")
    begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    if plain and not settings.chat_template:
        prompts, answers = asked(rows, settings.separator), rows.columns["response"]
        return [
            [Piece(apart(prompt, settings.separator), False), Piece(response, True, True, response)]
            for prompt, response in zip(prompts, answers, strict=True)
        ], begin
    if not has_template:
        return [_plain_chat(messages) for messages in rows.columns["messages"]], begin
    if plain:
        pairs = zip(asked(rows, settings.separator), rows.columns["response"], strict=True)
        talks = [[_message("user", prompt), _message(ANSWERS, response)] for prompt, response in pairs]
    else:
        talks = list(rows.columns["messages"])
    made = []
    for number, messages in enumerate(talks, 1):
        try:
            made.append(_templated(messages, tokenizer))
        except DataProblem:
            raise
        except Exception as error:  # noqa: BLE001 - templates are programs and raise what they like
            why = " ".join(str(error).split())[:200]
            raise DataProblem(f"the chat template does not take conversation {number}", why=why) from None
    return made, []  # a template writes the first token itself


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def apart(text: str, separator: str) -> str:
    """Text with a separator behind it, unless it ends in white space or is empty."""
    return text if not text or text[-1].isspace() else text + separator


def asked(rows: Examples, separator: str) -> list[str]:
    """Prompts, each with its input where there is one."""
    prompts = list(rows.columns["prompt"])
    if "input" not in rows.columns:
        return prompts
    pairs = zip(prompts, rows.columns["input"], strict=True)
    return [apart(prompt, separator) + given if given else prompt for prompt, given in pairs]


def _plain_chat(messages: Conversation) -> list[Piece]:
    """The form of conversations for tokenizers without a template: a line with the role, the text, an empty line.

    An answer ends in the end-of-sequence token instead.
    """
    pieces = []
    for message in messages:
        heading = f"{message['role'].capitalize()}:\n"
        if message["role"] == ANSWERS:
            pieces += [Piece(heading, False), Piece(message["content"], True, True, message["content"])]
        else:
            pieces.append(Piece(f"{heading}{message['content']}\n\n", False))
    return _merged(pieces)


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces that do not count joined to one, and what comes after the last that counts left out."""
    made: list[Piece] = []
    for piece in pieces:
        if made and not made[-1].counts and not piece.counts:
            made[-1] = Piece(made[-1].text + piece.text, False)
        else:
            made.append(piece)
    return made[:-1] if len(made) > 1 and not made[-1].counts else made


def _templated(messages: Conversation, tokenizer: Any) -> list[Piece]:
    """A conversation by the tokenizer's template, where every answer counts.

    Templates that write an earlier answer otherwise than the last one leave only the last to learn.

    Raises:
        DataProblem: not even the last answer follows what is written to ask for it.
    """

    def written(count: int, ask: bool = False) -> str:
        made: str = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask)
        return made

    places = [i for i, message in enumerate(messages) if message["role"] == ANSWERS and i > 0]
    if not places:
        return [Piece(written(len(messages)), False)]
    whole = written(places[-1] + 1)
    return (
        _answers(messages, places, written, whole)
        or _answers(messages, places[-1:], written, whole)
        or _refuse("its template does not write an answer behind the question for it")
    )


def _answers(
    messages: Conversation, places: Sequence[int], written: Callable[..., str], whole: str
) -> list[Piece] | None:
    """Pieces of a conversation with the answers at some places; None where it is not written turn by turn."""
    pieces, at = [], 0
    for place in places:
        start, end = written(place, True), written(place + 1)
        if len(start) < at or not (end.startswith(start) and whole.startswith(end)):
            return None
        answer = Piece(whole[len(start) : len(end)], True, place == places[-1], messages[place]["content"])
        pieces += [Piece(whole[at : len(start)], False), answer]
        at = len(end)
    return pieces


def _refuse(why: str) -> list[Piece]:
    raise DataProblem("responses cannot be told from prompts", why=why, hint="give prompt and response columns")


def _joined(
    row: Sequence[Piece], encoded: Sequence[Sequence[int]], begin: Sequence[int], end: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a row and whether each counts; of an answer what comes behind its end does not."""
    ids, counted = list(begin), [False] * len(begin)
    for piece, tokens in zip(row, encoded, strict=True):
        own = list(tokens)
        counts = len(own) if piece.counts else 0
        if piece.counts and end is not None:
            if end in own:
                counts = own.index(end) + 1
            elif piece.ends:
                own.append(end)
                counts = len(own)
        ids += own
        counted += [True] * counts + [False] * (len(own) - counts)
    if counted:
        counted[0] = False  # nothing comes before it
    last = max((i for i, value in enumerate(counted) if value), default=-1) + 1
    return np.array(ids[: last or None], dtype=np.int64), np.array(counted[: last or None], dtype=bool)


def _fitted(
    ids: np.ndarray, counted: np.ndarray, limit: int, begin: int, cut: bool, tally: _Tally
) -> tuple[np.ndarray, np.ndarray] | None:
    """A row of at most `limit` tokens: cut on the right, or None where it would have nothing to learn."""
    if not counted.any():
        tally.empty += 1
        return None
    prompt = int(counted.argmax())
    if prompt >= limit:
        if not cut:
            tally.too_long += 1
            return None
        tally.shortened += 1
        room = limit - min(len(ids) - prompt, max(1, limit // _CUT_RESPONSE))
        begin = min(begin, room - 1)
        kept = np.r_[0:begin, prompt - (room - begin) : len(ids)]
        ids, counted = ids[kept], counted[kept]
    if len(ids) > limit:
        tally.cut += 1
    return ids[:limit], counted[:limit]


def _report(tally: _Tally, count: int, limit: int, run: Run) -> None:
    """Say what became of the rows."""
    said: Mapping[str, int] = {
        f"left out, whose prompts have {limit} tokens or more (data.max_length, data.long_prompts)": tally.too_long,
        "left out, which have no response": tally.empty,
    }
    for what, number in said.items():
        if number:
            run.reporter.warn(f"{number} of {count} rows {what}")
    if tally.shortened:
        run.reporter.info(f"{tally.shortened} of {count} prompts cut on the left to {limit} tokens with the response")
    if tally.cut:
        run.reporter.info(f"{tally.cut} of {count} responses cut on the right at {limit} tokens")
