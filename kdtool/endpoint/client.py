"""Asking a server: many questions at once, again after faults that pass, never longer than allowed."""

import asyncio
import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx2

from kdtool.endpoint import protocol
from kdtool.endpoint.protocol import Ask, Choice, Sampling
from kdtool.endpoint.reference import KEY, EndpointRef
from kdtool.errors import EndpointProblem, ModelProblem, UsageProblem, nearest
from kdtool.hub.retry import asked_wait, seconds
from kdtool.run import Run

TRIES = 6
"""Times a question is sent at most."""
TRIES_UNREACHABLE = 3
"""Times a question is sent at most while nobody answers."""
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
_LONGEST_WAIT = 30.0
_CONNECT = 10.0
_IDLE = 120.0  # seconds without a byte; a server that queues questions may be silent for long
_GRACE = 30.0  # seconds that other questions have to end once one has failed
_jitter = random.SystemRandom()  # never the generators of the run: asking again must not change results


@dataclass(slots=True)
class _Fault(Exception):
    """One failed try.

    Attributes:
        what: What happened, as a phrase after "the endpoint".
        status: HTTP status, 0 where none was received.
        headers: Of the answer.
        said: What the server gave as the reason.
        passes: Whether another try may go better.
        unreachable: Whether nobody answered at all.
    """

    what: str
    status: int = 0
    headers: Any = None
    said: str = ""
    passes: bool = True
    unreachable: bool = False


class Endpoint:
    """A server and the model asked for.

    Waits double from KDTOOL_ENDPOINT_BACKOFF seconds (default 1), each shortened at random by up to a
    half; a wait that the server asks for (`Retry-After`) is kept in full by all questions. One question
    ends after KDTOOL_ENDPOINT_DEADLINE seconds (default 600) with all its tries;
    KDTOOL_ENDPOINT_PARALLEL (default 8) are on their way at a time.

    Args:
        reference: Address and model.
        run: Hears of waits and progress; `offline` allows servers of this machine only.
        sampling: How to draw.

    Raises:
        UsageProblem: the settings in the environment, or offline mode, do not allow it.
    """

    def __init__(self, reference: EndpointRef, run: Run, sampling: Sampling) -> None:
        if run.offline and not reference.local:
            raise UsageProblem(
                f"{reference.url} is on the network, and offline is set", hint="leave out --offline, or run it here"
            )
        self.reference = reference
        self.run = run
        self.sampling = sampling
        self._key = reference.key()
        self._backoff = seconds("KDTOOL_ENDPOINT_BACKOFF", 1.0)
        self._deadline = seconds("KDTOOL_ENDPOINT_DEADLINE", 600.0)
        self._parallel = max(1, int(seconds("KDTOOL_ENDPOINT_PARALLEL", 8.0)))
        self._not_before = 0.0
        if self._key and not (reference.encrypted or reference.local):
            run.reporter.warn(f"the key goes to {reference.url} unencrypted")

    def check(self) -> None:
        """Ask whether the server is there and has the model.

        Raises:
            EndpointProblem: it is not there, or refuses.
            ModelProblem: it lists its models, and the one asked for is not among them.
        """
        known: list[str] = _finished(self._models())
        if known and self.reference.model not in known:
            raise ModelProblem(
                f"{self.reference.url} has no model '{self.reference.model}'",
                hint=nearest(self.reference.model, known),
            )

    def ask(self, ask: Ask) -> list[Choice]:
        """The answers to one question; see `ask_all`."""
        found: list[list[Choice]] = []
        self.ask_all([ask], lambda _, choices: found.append(choices))
        return found[0]

    def ask_all(self, asks: Iterable[Ask], done: Callable[[int, list[Choice]], None]) -> None:
        """Ask many questions, some at a time.

        Args:
            asks: The questions; taken one by one as there is room.
            done: Called in this thread with the number of a question and its `n` answers, as soon as they are
                there: in any order.

        Raises:
            EndpointProblem: a question failed for good; what was answered before has been handed over.
        """
        _finished(self._work(enumerate(asks), done))

    async def _work(self, asks: Iterator[tuple[int, Ask]], done: Callable[[int, list[Choice]], None]) -> None:
        failed = False
        async with self._client() as client:

            async def serve() -> None:
                nonlocal failed
                try:
                    for number, ask in asks:
                        done(number, await self._in_time(client, ask))
                        if failed:
                            return
                except Exception:
                    failed = True
                    raise

            workers = [asyncio.create_task(serve()) for _ in range(self._parallel)]
            try:
                _, going = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
                if going:
                    # what is under way has been paid for
                    await asyncio.wait(going, timeout=_GRACE)
                for worker in workers:
                    if worker.done():
                        worker.result()
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    def _client(self) -> httpx2.AsyncClient:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        timeout = httpx2.Timeout(_IDLE, connect=_CONNECT, pool=None)
        limits = httpx2.Limits(max_connections=self._parallel)
        # a proxy of the environment cannot reach a server of this machine
        return httpx2.AsyncClient(headers=headers, timeout=timeout, limits=limits, trust_env=not self.reference.local)

    async def _in_time(self, client: httpx2.AsyncClient, ask: Ask) -> list[Choice]:
        """All answers to a question; servers that give fewer than asked for are asked again."""
        found: list[Choice] = []
        try:
            async with asyncio.timeout(self._deadline):
                while len(found) < ask.n:
                    seed = None if ask.seed is None else ask.seed + len(found)
                    rest = replace(ask, n=ask.n - len(found), seed=seed)
                    found += await self._patiently(lambda rest=rest: self._once(client, rest))  # type: ignore[misc]
        except TimeoutError:
            raise EndpointProblem(
                f"{self.reference.url} gave no whole answer in {self._deadline:g} s",
                hint="set KDTOOL_ENDPOINT_DEADLINE to more seconds, or ask for shorter texts",
            ) from None
        return found

    async def _patiently(self, once: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Try until it works or a fault stays.

        Raises:
            EndpointProblem: it stays.
        """
        tries = 0
        while True:
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            try:
                return await once()
            except _Fault as fault:
                tries += 1
                if not fault.passes or tries >= (TRIES_UNREACHABLE if fault.unreachable else TRIES):
                    raise self._problem(fault) from None
                await asyncio.sleep(self._wait(fault, tries))

    def _wait(self, fault: _Fault, tries: int) -> float:
        """Seconds until the next try.

        Raises:
            EndpointProblem: the server asks to wait longer than a question may take.
        """
        asked = asked_wait(fault.headers or {})
        if asked is not None and asked > self._deadline:
            raise self._problem(fault) from None
        if asked is not None:
            self._not_before = max(self._not_before, time.monotonic() + asked)
        wait = min(_LONGEST_WAIT, self._backoff * 2 ** (tries - 1)) * _jitter.uniform(0.5, 1.0)
        wait = wait if asked is None else asked
        say = self.run.reporter.warn if wait >= 5 else self.run.reporter.info
        say(f"the endpoint {fault.what}; trying again in {wait:.1f} s")
        return wait

    async def _once(self, client: httpx2.AsyncClient, ask: Ask) -> list[Choice]:
        """Send a question and read its answer.

        Raises:
            _Fault: anything that went wrong.
        """
        path, body = protocol.request(self.reference.model, ask, self.sampling)
        answer = protocol.Answer(ask.n)
        try:
            async with client.stream("POST", self.reference.url + path, json=body) as response:
                if response.status_code != 200:
                    raise self._fault_of(response.status_code, response.headers, await response.aread())
                if "event-stream" in response.headers.get("Content-Type", ""):
                    async for part in response.aiter_bytes():
                        answer.feed(part)
                else:
                    answer.take(await response.aread())
            return answer.finish()
        except httpx2.RequestError as error:
            raise self._transport(error) from None
        except protocol.Broken as error:
            raise _Fault(f"broke off: {error}") from None
        except protocol.Refused as error:
            passes = error.status in _PASSING
            raise _Fault("reported an error", error.status, said=self._clean(str(error)), passes=passes) from None

    async def _models(self) -> list[str]:
        """Names that the server lists; none where it has no list."""
        async with self._client() as client:

            async def once() -> list[str]:
                try:
                    response = await client.get(f"{self.reference.url}/models")
                except httpx2.RequestError as error:
                    raise self._transport(error) from None
                if response.status_code in (401, 403) or response.status_code in _PASSING:
                    raise self._fault_of(response.status_code, response.headers, response.content)
                try:
                    return [str(entry["id"]) for entry in response.json()["data"]]
                except (ValueError, KeyError, TypeError):
                    return []

            found: list[str] = await self._patiently(once)
            return found

    def _transport(self, error: httpx2.RequestError) -> _Fault:
        """What failed below HTTP."""
        unreachable = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
        what = "cannot be reached" if unreachable else "broke off"
        said = self._clean(str(error)) or type(error).__name__
        return _Fault(what, said=said, unreachable=unreachable)

    def _fault_of(self, status: int, headers: Any, content: bytes) -> _Fault:
        """What a status other than 200 means."""
        said = content.decode("utf-8", "replace")
        quota = "insufficient_quota" in said  # a 429 that no waiting helps
        said = self._clean(_reason(said))
        return _Fault(f"answered {status}", status, headers, said, passes=status in _PASSING and not quota)

    def _clean(self, text: str) -> str:
        """One short line without the key."""
        if self._key:
            text = text.replace(self._key, "[redacted]")
        return " ".join(text.split())[:300]

    def _problem(self, fault: _Fault) -> EndpointProblem:
        """What to tell the user of a fault that stays."""
        hints = {
            401: f"set {KEY} in the environment to the key of this server",
            403: f"the key in {KEY} may not use this model",
            404: "check the address (it often ends in /v1) and the name of the model",
            429: "wait, or set KDTOOL_ENDPOINT_PARALLEL to fewer questions at a time; what was answered is kept",
        }
        hint = hints.get(fault.status)
        if fault.status == 400 and "logprobs" in fault.said:
            hint = "ask for fewer: --set train.teacher_cache_top_k=K; or start the server with --max-logprobs K (vLLM)"
        if fault.unreachable:
            hint = "start the server, or check the address"
        elif hint is None and fault.passes:
            hint = "run the same command again: what was answered is kept"
        return EndpointProblem(f"the endpoint {self.reference.url} {fault.what}", why=fault.said or None, hint=hint)


def _reason(text: str) -> str:
    """The message in an error document, or the document."""
    try:
        values = json.loads(text)
        error = values.get("error", values)
        return str(error.get("message") or text) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError, RecursionError):
        return text


def _finished(work: Coroutine[Any, Any, Any]) -> Any:
    """Result of a coroutine, also where the caller's thread runs a loop of its own, as notebooks do."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    found: list[Any] = []
    failed: list[BaseException] = []

    def apart() -> None:
        try:
            found.append(asyncio.run(work))
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failed.append(error)

    thread = threading.Thread(target=apart)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def seeds(seed: int, numbers: Sequence[int]) -> int:
    """A seed that belongs to some numbers, such as that of a question; fits 31 bits, which all servers take."""
    digest = hashlib.sha256(repr((seed, *numbers)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
