"""Conversations: lists of messages, each with a role and a text."""

from collections.abc import Mapping, Sequence
from typing import Any

from kdtool.errors import DataProblem

Conversation = list[dict[str, str]]

ANSWERS = "assistant"
"""Role of those messages that a model learns."""

# ShareGPT's names to those of chat templates
_ROLES: Mapping[str, str] = {"human": "user", "gpt": ANSWERS, "chatgpt": ANSWERS, "bot": ANSWERS}


def conversations(values: Sequence[Any], where: str) -> list[Conversation]:
    """Rows of messages under the names `role` and `content`; `from` and `value` are understood too.

    Args:
        values: A list of messages for each row.
        where: What the column is, for messages.

    Raises:
        DataProblem: a row has no messages, or a message has no role or no text; names the row.
    """
    return [_conversation(row, f"row {number} of {where}") for number, row in enumerate(values, 1)]


def _conversation(row: Any, where: str) -> Conversation:
    if not row:
        raise DataProblem(f"{where} holds no messages", hint="remove the row")
    made = []
    for message in row:
        role = message.get("role") or message.get("from") if message else None
        text = message.get("content", message.get("value")) if message else None
        if not isinstance(role, str) or not isinstance(text, str):
            raise DataProblem(
                f"a message in {where} has no role or no text",
                why=f"{message!r:.80}",
                hint='messages are {"role": "user", "content": "..."}',
            )
        made.append({"role": _ROLES.get(role, role), "content": text})
    return made
