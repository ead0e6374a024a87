"""What is sent to an OpenAI-compatible server, and how its answer is read: whole, or streamed as events."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_LONGEST = 1 << 24  # bytes of one event; more is no text of a model


class Broken(Exception):
    """An answer that ends too early or is not what the protocol says; asking again may help."""


class Refused(Exception):
    """The server says within a stream that it will not go on.

    Attributes:
        status: HTTP status that it stands for, 0 where it does not say.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the server draws.

    Attributes:
        max_tokens: Longest text, in the server's tokens.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Nucleus.
        stop: Texts that end an answer, without belonging to it.
        top_logprobs: How many of the most likely tokens to report at each place; 0 for none.
        echo: Report those of the prompt, too, before the answer, in one document.
        as_ids: Name tokens by their ids, as `token_id:5`, where the server knows how to.
    """

    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    echo: bool = False
    as_ids: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """One question to the server.

    Attributes:
        prompt: Text or token ids to go on from (completions), or messages with `role` and `content` (chat completions).
        n: How many answers.
        seed: Seed of the draws, for servers that know one.
        max_tokens: Longest text, where it is not that of the sampling.
    """

    prompt: str | Sequence[int] | Sequence[Mapping[str, str]]
    n: int = 1
    seed: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer.

    Attributes:
        text: As the server writes it.
        log_prob: Its log-probability.
        top: The most likely tokens in its place with their log-probabilities, best first.
    """

    text: str
    log_prob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(slots=True)
class Choice:
    """One answer.

    Attributes:
        text: What was written.
        finish: Why it ended: `stop`, `length`, or what else the server says.
        tokens: Its tokens, where log-probabilities were asked for.
    """

    text: str = ""
    finish: str | None = None
    tokens: list[Token] = field(default_factory=list)


def request(model: str, ask: Ask, sampling: Sampling) -> tuple[str, dict[str, Any]]:
    """Path below the base address, and the body."""
    body: dict[str, Any] = {
        "model": model,
        "n": ask.n,
        "max_tokens": sampling.max_tokens if ask.max_tokens is None else ask.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stream": not sampling.echo,
    }
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if ask.seed is not None:
        body["seed"] = ask.seed
    if sampling.as_ids:
        body["return_tokens_as_token_ids"] = True
    messages = [dict(message) for message in ask.prompt if isinstance(message, Mapping)]
    if messages:
        if sampling.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
        return "/chat/completions", body | {"messages": messages}
    if sampling.top_logprobs:
        body["logprobs"] = sampling.top_logprobs
    if sampling.echo:
        body["echo"] = True
    return "/completions", body | {"prompt": ask.prompt if isinstance(ask.prompt, str) else list(ask.prompt)}


class Answer:
    """Puts an answer together from the bytes that arrive.

    Args:
        n: How many choices were asked for.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.choices: dict[int, Choice] = {}
        self.done = False
        self._rest = b""
        self._event: list[bytes] = []

    def feed(self, data: bytes) -> None:
        """Read a piece of an event stream, cut anywhere.

        Raises:
            Broken: an event that is not JSON, or endless.
            Refused: the server reports an error.
        """
        # only these two bytes end a line: JSON may hold other line separators of Unicode as they are
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST:
            raise Broken("an event of the stream has no end")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._event.append(line[5:].strip())
            elif not line and self._event:
                self._dispatch(b"\n".join(self._event))
                self._event = []

    def _dispatch(self, event: bytes) -> None:
        if event == b"[DONE]":
            self.done = True
        else:
            self.take(event)

    def take(self, document: bytes) -> None:
        """Read one JSON object: an event, or the whole answer.

        Raises:
            Broken, Refused: as for `feed`.
        """
        try:
            values = json.loads(document)
            if values.get("error"):
                raise _refusal(values["error"])
            for entry in values["choices"]:
                self._add(entry)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise Broken(f"not the JSON of an answer ({type(error).__name__})") from None

    def _add(self, entry: Mapping[str, Any]) -> None:
        choice = self.choices.setdefault(int(entry.get("index") or 0), Choice())
        part = entry.get("delta") or entry.get("message")
        text = entry.get("text") if part is None else part.get("content")
        if text is not None and not isinstance(text, str):
            raise TypeError("a text that is none")
        choice.text += text or ""
        choice.tokens += _tokens(entry.get("logprobs") or {})
        choice.finish = entry.get("finish_reason") or choice.finish

    def finish(self) -> list[Choice]:
        """The choices, in order.

        Raises:
            Broken: the answer is not whole.
        """
        ended = [choice for choice in self.choices.values() if choice.finish is not None]
        if not self.done and (len(ended) < len(self.choices) or not ended):
            raise Broken("the answer was cut off")
        if not self.choices:
            raise Broken("an answer without choices")
        for choice in self.choices.values():
            # a character beyond the first 65536 may arrive as two halves, in two events
            choice.text = choice.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return [self.choices[index] for index in sorted(self.choices)][: self.n]


def _tokens(logprobs: Mapping[str, Any]) -> list[Token]:
    """Tokens with log-probabilities, of either kind of answer."""
    if "content" in logprobs:
        return [
            Token(
                str(entry["token"]),
                float(entry["logprob"]),
                tuple((str(top["token"]), float(top["logprob"])) for top in entry.get("top_logprobs") or ()),
            )
            for entry in logprobs["content"] or ()
        ]
    texts, values = logprobs.get("tokens") or (), logprobs.get("token_logprobs") or ()
    tops = logprobs.get("top_logprobs") or [{}] * len(texts)
    found = []
    for text, value, top in zip(texts, values, tops, strict=True):
        best = sorted((top or {}).items(), key=lambda item: -item[1])
        found.append(Token(str(text), float(value or 0.0), tuple((str(name), float(one)) for name, one in best)))
    return found


def _refusal(error: Any) -> Refused:
    """What an error object says."""
    facts = error if isinstance(error, Mapping) else {"message": error}
    code = str(facts.get("code"))
    status = int(code) if code.isdigit() else 0
    kind = f"{facts.get('type')} {code}".lower()
    if not status and any(word in kind for word in ("rate_limit", "overloaded", "server_error", "timeout")):
        status = 503
    return Refused(str(facts.get("message") or "an error"), status)
