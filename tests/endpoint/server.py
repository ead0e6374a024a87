"""An OpenAI-compatible server on loopback: streams, samples, log-probabilities, and the faults of real ones."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Writer = Callable[[str, int], str]
"""From a prompt and the number of a choice to a text."""

Scorer = Callable[[list[int]], Any]
"""From token ids [n] to log-probabilities [n, vocabulary] of what follows each."""


def echo(prompt: str, number: int) -> str:
    """Says the last line of the prompt again."""
    return f"{prompt.splitlines()[-1]} ({number})"


@dataclass
class Fault:
    """What goes wrong with the next `times` questions: a status, a cut, silence, or nonsense.

    Attributes:
        cut: Events that still arrive before the connection is cut.
        garbage: Bytes sent as an event in place of JSON.
        error: Error object sent within the stream.
        slow: Seconds before each event.
        end: Events that arrive before the stream ends in good order, without its mark.
    """

    status: int = 200
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    cut: int | None = None
    garbage: bytes | None = None
    error: dict[str, Any] | None = None
    slow: float = 0.0
    end: int | None = None


class Server:
    """The server; use as a context manager."""

    def __init__(self, port: int = 0) -> None:
        self.write: Writer = echo
        self.score: Scorer | None = None
        self.names: list[str] | None = None  # texts of the tokens, for clients that do not ask for ids
        self.knows_ids = True
        self.most_tokens = 20  # log-probabilities given at a place; more are refused
        self.gives = 20  # or silently left out
        self.models = ["tiny"]
        self.key: str | None = None
        self.most = 128  # choices given at a time
        self.streams = True
        self.delay = 0.0
        self.escapes = False
        self.faults: list[Fault] = []
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.running = self.peak = 0
        self.lock = threading.Lock()
        owner = self

        class Bound(_Handler):
            server_of = owner

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Bound)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    @property
    def reference(self) -> str:
        return f"endpoint:{self.url}#tiny"

    def __enter__(self) -> "Server":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def take_fault(self) -> Fault | None:
        with self.lock:
            fault = next((fault for fault in self.faults if fault.times > 0), None)
            if fault is not None:
                fault.times -= 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: Server

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _may(self) -> bool:
        key = self.server_of.key
        given = self.headers.get("Authorization", "")
        if key is None or given == f"Bearer {key}":
            return True
        # as real servers do, it says the key that it was given
        self._send(401, {"error": {"message": f"Incorrect API key provided: {given}", "type": "invalid_request_error"}})
        return False

    def do_GET(self) -> None:
        if self.path == "/v1/models" and self._may():
            self._send(200, {"object": "list", "data": [{"id": name} for name in self.server_of.models]})
        elif self.path != "/v1/models":
            self._send(404, {"error": {"message": "no such route"}})

    def do_POST(self) -> None:
        owner = self.server_of
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with owner.lock:
            owner.asked.append({"path": self.path, **body})
            owner.headers.append(dict(self.headers))
            owner.running += 1
            owner.peak = max(owner.peak, owner.running)
        try:
            time.sleep(owner.delay)
            if self._may():
                self._answer(body, owner.take_fault() or Fault())
        finally:
            with owner.lock:
                owner.running -= 1

    def _answer(self, body: dict[str, Any], fault: Fault) -> None:
        if fault.status != 200:
            document = fault.body if fault.body is not None else {"error": {"message": "not now"}}
            self._send(fault.status, document, fault.headers)
            return
        if body["model"] not in self.server_of.models:
            self._send(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
            return
        if body.get("echo") and fault.cut is not None:
            self._abort()
            return
        if body.get("logprobs", 0) > self.server_of.most_tokens:
            most = f"Requested sample logprobs of {body['logprobs']}, which is greater than max allowed"
            self._send(400, {"error": {"message": most, "type": "BadRequestError", "code": 400}})
            return
        if not (body.get("stream") and self.server_of.streams):
            whole = fault.garbage if fault.garbage is not None else self._whole(body)
            self._send(200, whole)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk(b": keep-alive\r\n\r\n")
        self._stream(body, fault)

    def _stream(self, body: dict[str, Any], fault: Fault) -> None:
        for number, event in enumerate(self._events(body)):
            time.sleep(fault.slow)
            if number == fault.cut:
                self._abort()
                return
            if number == fault.end:
                self._chunk(b"")
                return
            if fault.error is not None and number == 1:
                event = {"error": fault.error}
            data = json.dumps(event, ensure_ascii=self.server_of.escapes).encode()
            if fault.garbage is not None and number == 1:
                data = fault.garbage
            # two pieces, so that events do not end where pieces end
            middle = len(data) // 2
            self._chunk(b"data: " + data[:middle])
            self._chunk(data[middle:] + b"\n\n")
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        try:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()
        except OSError:
            self.close_connection = True

    def _abort(self) -> None:
        """Cut the connection without saying goodbye."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _texts(self, body: dict[str, Any]) -> list[str]:
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        count = min(body.get("n", 1), self.server_of.most)
        return [self.server_of.write(prompt, number) for number in range(count)]

    def _scored(self, body: dict[str, Any]) -> Any:
        """A row given back with what the model thinks of each of its tokens, and the one it writes behind them."""
        owner, ids = self.server_of, body["prompt"]
        assert owner.score is not None
        assert (body["max_tokens"], body["temperature"]) == (1, 0.0)
        likely = owner.score(ids)
        places = [None, *likely]  # nothing is known of the first token
        ids = [*ids, max(range(len(likely[-1])), key=lambda i: float(likely[-1][i]))]
        by_id = owner.knows_ids and body.get("return_tokens_as_token_ids")

        def name(token: int) -> str:
            return f"token_id:{token}" if by_id else (owner.names or [])[token]

        tops: list[Any] = [None]
        for token, own in list(zip(ids, places, strict=True))[1:]:
            assert own is not None
            best = sorted(range(len(own)), key=lambda i: -float(own[i]))[: min(body["logprobs"], owner.gives)]
            # as OpenAI and vLLM do, the token itself comes, too, and first
            tops.append({name(i): float(own[i]) for i in dict.fromkeys([token, *best])})
        values = [None] + [top[name(token)] for token, top in zip(ids[1:], tops[1:], strict=True)]
        logprobs = {"tokens": [name(token) for token in ids], "token_logprobs": values, "top_logprobs": tops}
        return {"choices": [{"index": 0, "text": "...", "finish_reason": "length", "logprobs": logprobs}]}

    def _whole(self, body: dict[str, Any]) -> Any:
        if body.get("echo") and self.server_of.score is not None:
            return self._scored(body)
        chats = "messages" in body
        choices = []
        for index, text in enumerate(self._texts(body)):
            choice: dict[str, Any] = {"index": index, "finish_reason": "stop"}
            choice |= {"message": {"role": "assistant", "content": text}} if chats else {"text": text}
            choices.append(choice | _logprobs(body, text.split(" ")))
        return {"id": "1", "object": "text_completion", "choices": choices, "usage": {"total_tokens": 1}}

    def _events(self, body: dict[str, Any]) -> Iterator[Any]:
        """Pieces of all choices in turn, as servers send them."""
        chats = "messages" in body
        texts = self._texts(body)
        pieces = [text.replace(" ", "\0 ").split("\0") for text in texts]
        if chats:
            for index in range(len(texts)):
                yield {"choices": [{"index": index, "delta": {"role": "assistant"}, "finish_reason": None}]}
        for place in range(max(map(len, pieces))):
            for index, own in enumerate(pieces):
                if place < len(own):
                    said = {"delta": {"content": own[place]}} if chats else {"text": own[place]}
                    logprobs = _logprobs(body, [own[place]])
                    yield {"choices": [{"index": index, "finish_reason": None, **said, **logprobs}]}
        for index in range(len(texts)):
            end: dict[str, Any] = {"delta": {}} if chats else {"text": ""}
            yield {"choices": [{"index": index, "finish_reason": "stop", **end}]}
        yield {"choices": [], "usage": {"total_tokens": 1}}


def _logprobs(body: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    if not body.get("logprobs"):
        return {}
    if "messages" in body:
        count = body["top_logprobs"]
        tops = [{"token": f"t{rank}", "logprob": -float(rank + 1)} for rank in range(count)]
        return {"logprobs": {"content": [{"token": t, "logprob": -0.5, "top_logprobs": tops} for t in tokens]}}
    top = {f"t{rank}": -float(rank + 1) for rank in range(body["logprobs"])}
    values = {"tokens": tokens, "token_logprobs": [-0.5] * len(tokens), "top_logprobs": [top] * len(tokens)}
    return {"logprobs": values}
