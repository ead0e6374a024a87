"""Asking again after faults that pass: refusals for now, server faults, cut connections."""

import os
import random
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import TypeVar

from kdtool.errors import UsageProblem
from kdtool.hub.problems import is_refused, is_transport, status_of
from kdtool.run import Run

T = TypeVar("T")

TRIES = 5
"""Times a request is made at most."""
TRIES_UNREACHABLE = 3
"""Times a request is made at most while nobody answers."""
_PASSING = frozenset({429, 500, 502, 503, 504})
_LONGEST = 30.0
_jitter = random.SystemRandom()  # never the generators of the run: asking again must not change results


def seconds(name: str, default: float) -> float:
    """A duration from the environment.

    Raises:
        UsageProblem: not a number of seconds.
    """
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1e6:
        raise UsageProblem(f"{name}={text} is not a number of seconds", hint=f"such as {name}={default:g}")
    return value


def passes(error: BaseException) -> bool:
    """Whether an exception may be gone at the next try."""
    return is_transport(error) or status_of(error) in _PASSING


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds a server asks to wait: `Retry-After` (seconds or date), or the `t` of `RateLimit`."""
    after = headers.get("Retry-After")
    if after is not None:
        try:
            return max(0.0, float(after))
        except ValueError:
            pass  # then it is a date
        try:
            return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
        except ValueError:
            return None
    for part in headers.get("RateLimit", "").split(";"):
        key, _, value = part.strip().partition("=")
        if key == "t" and value.isdigit():
            return float(value)
    return None


class Patience:
    """How long to go on with one request.

    Waits double from KDTOOL_HUB_BACKOFF seconds (default 1), each shortened at random by up to a half so
    that many machines do not come back at once; a wait that the server asks for is kept in full. All
    of it ends after KDTOOL_HUB_DEADLINE seconds (default 120).

    Args:
        run: Hears of waits.
        what: What is asked for, in messages.
    """

    def __init__(self, run: Run, what: str) -> None:
        self.run = run
        self.what = what
        self.tries = 0
        self.base = seconds("KDTOOL_HUB_BACKOFF", 1.0)
        self.end = time.monotonic() + seconds("KDTOOL_HUB_DEADLINE", 120.0)

    def after(self, error: Exception) -> bool:
        """Wait if another try makes sense.

        Returns:
            False when the error does not pass, or tries or time are used up.
        """
        self.tries += 1
        limit = TRIES_UNREACHABLE if is_refused(error) else TRIES
        if not passes(error) or self.tries >= limit:
            return False
        asked = asked_wait(getattr(getattr(error, "response", None), "headers", None) or {})
        backoff = min(_LONGEST, self.base * 2 ** (self.tries - 1)) * _jitter.uniform(0.5, 1.0)
        wait = backoff if asked is None else asked
        if time.monotonic() + wait > self.end:
            return False
        status = status_of(error)
        fault = f"answered {status}" if status else "cannot be reached" if is_refused(error) else "broke off"
        say = self.run.reporter.warn if wait >= 5 else self.run.reporter.info
        say(f"the Hub {fault} at {self.what}; trying again in {wait:.1f} s")
        time.sleep(wait)
        return True


def attempt(call: Callable[[], T], run: Run, what: str) -> T:
    """Call, and call again after faults that pass; `call` must be safe to repeat.

    Raises:
        Exception: the last fault, as the client raised it.
    """
    patience = Patience(run, what)
    while True:
        try:
            return call()
        except Exception as error:
            if not patience.after(error):
                raise
