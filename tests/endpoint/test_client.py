"""Asking a real server: whole and streamed answers, faults that pass and faults that stay."""

import asyncio
import time

import pytest

from kdtool.endpoint import Ask, EndpointRef, Sampling
from kdtool.endpoint.client import TRIES, Endpoint
from kdtool.errors import EndpointProblem, ModelProblem, UsageProblem
from kdtool.run import Run, Silent
from tests.endpoint.server import Fault


class Hears(Silent):
    """Keeps what a run says."""

    def __init__(self):
        self.said = []

    def info(self, message):
        self.said.append(message)

    warn = info


def endpoint(server, run=None, **sampling):
    return Endpoint(EndpointRef.parse(server.reference), run or Run(), Sampling(**sampling))


def texts(choices):
    return [choice.text for choice in choices]


MESSAGES = ({"role": "user", "content": "hello there"},)


@pytest.mark.parametrize("streams", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("prompt", ["hello there", MESSAGES], ids=["completion", "chat"])
def test_several_samples_with_log_probabilities(server, streams, prompt):
    server.streams = streams
    found = endpoint(server, top_logprobs=2, max_tokens=7, stop=("\n",)).ask(Ask(prompt, n=3, seed=5))
    assert texts(found) == [f"hello there ({number})" for number in range(3)]
    assert {choice.finish for choice in found} == {"stop"}
    assert len(found[0].tokens) == 3
    assert found[0].tokens[0].log_prob == -0.5
    assert found[0].tokens[0].top == (("t0", -1.0), ("t1", -2.0))
    (asked,) = server.asked
    assert asked["path"] == ("/v1/completions" if isinstance(prompt, str) else "/v1/chat/completions")
    assert (asked["n"], asked["seed"], asked["max_tokens"], asked["stop"]) == (3, 5, 7, ["\n"])


def test_a_server_that_gives_fewer_is_asked_again(server):
    server.most = 2
    assert len(endpoint(server).ask(Ask("go on", n=5, seed=1))) == 5
    assert [(asked["n"], asked["seed"]) for asked in server.asked] == [(5, 1), (3, 3), (1, 5)]


def test_texts_hold_any_character(server):
    # U+2028 ends a line for Unicode, not for an event stream; the last sign takes four bytes
    text = "a\u2028b\u0085c \U0001f600\r\nd"
    server.write = lambda prompt, number: text
    assert texts(endpoint(server).ask(Ask("x"))) == [text]


PASSING = {
    "limited": Fault(429, headers={"Retry-After": "0"}),
    "failed": Fault(500, body=b"<html>oops</html>"),
    "unavailable": Fault(503),
    "nonsense": Fault(garbage=b'{"choices": [{"ind'),
    "no answer": Fault(garbage=b'{"choices": 3}'),
    "cut": Fault(cut=2),
    "ended early": Fault(end=2),
    "error in the stream": Fault(error={"message": "engine died", "type": "server_error"}),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_faults_that_pass(server, fault):
    server.faults = [Fault(**{name: getattr(fault, name) for name in fault.__dataclass_fields__} | {"times": 2})]
    hears = Hears()
    assert texts(endpoint(server, Run(reporter=hears)).ask(Ask("still here"))) == ["still here (0)"]
    assert len(server.asked) == 3
    assert len([line for line in hears.said if "trying again" in line]) == 2


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_tries_are_bounded(server, fault):
    server.faults = [Fault(**{name: getattr(fault, name) for name in fault.__dataclass_fields__} | {"times": 99})]
    with pytest.raises(EndpointProblem) as caught:
        endpoint(server).ask(Ask("x"))
    assert len(server.asked) == TRIES
    assert caught.value.exit_code == 4


def test_the_wait_that_a_server_asks_for_is_kept_by_all(server):
    server.faults = [Fault(429, headers={"Retry-After": "0.4"})]
    began = time.monotonic()
    found = []
    endpoint(server).ask_all([Ask(f"q{i}") for i in range(20)], lambda i, choices: found.append(i))
    assert time.monotonic() - began >= 0.4
    assert sorted(found) == list(range(20))


def test_a_wait_longer_than_a_question_may_take_fails_at_once(server, monkeypatch):
    monkeypatch.setenv("KDTOOL_ENDPOINT_DEADLINE", "5")
    server.faults = [Fault(429, headers={"Retry-After": "3600"})]
    began = time.monotonic()
    with pytest.raises(EndpointProblem, match="answered 429"):
        endpoint(server).ask(Ask("x"))
    assert time.monotonic() - began < 3


def test_a_slow_stream_ends_at_the_deadline(server, monkeypatch):
    monkeypatch.setenv("KDTOOL_ENDPOINT_DEADLINE", "0.5")
    server.faults = [Fault(slow=0.2, times=9)]
    with pytest.raises(EndpointProblem, match=r"no whole answer in 0\.5 s"):
        endpoint(server).ask(Ask("a b c d e f g"))


def test_no_more_questions_at_a_time_than_allowed(server, monkeypatch):
    monkeypatch.setenv("KDTOOL_ENDPOINT_PARALLEL", "3")
    server.delay = 0.02
    found = {}
    endpoint(server).ask_all([Ask(f"q{i}") for i in range(12)], found.__setitem__)
    assert server.peak == 3
    assert [texts(found[i]) for i in range(12)] == [[f"q{i} (0)"] for i in range(12)]


STAYING = {
    400: ({"error": {"message": "max_tokens is too large"}}, "max_tokens is too large"),
    401: ({"error": "no key"}, "no key"),
    404: ({"detail": "Not Found"}, "Not Found"),
    429: ({"error": {"message": "no money left", "code": "insufficient_quota"}}, "no money left"),
    302: (b"", "answered 302"),
}


@pytest.mark.parametrize("status", STAYING)
def test_faults_that_stay_are_not_tried_again(server, status):
    body, said = STAYING[status]
    server.faults = [Fault(status, body=body, headers={"Location": "http://192.0.2.1/"}, times=9)]
    with pytest.raises(EndpointProblem) as caught:
        endpoint(server).ask(Ask("x"))
    assert len(server.asked) == 1
    assert said in caught.value.as_dict()["message"]


def test_what_was_answered_before_a_failure_is_handed_over(server, monkeypatch):
    monkeypatch.setenv("KDTOOL_ENDPOINT_PARALLEL", "1")
    found = []

    def note(number, choices):
        found.append(number)
        if number == 2:
            server.faults = [Fault(400)]

    with pytest.raises(EndpointProblem):
        endpoint(server).ask_all([Ask(f"q{i}") for i in range(9)], note)
    assert found == [0, 1, 2]


def test_nobody_there(server):
    reference = EndpointRef(server.url.replace(str(server.server.server_port), "9"), "tiny")
    with pytest.raises(EndpointProblem, match="cannot be reached") as caught:
        Endpoint(reference, Run(), Sampling()).check()
    assert "start the server" in caught.value.hint


def test_the_model_must_be_among_those_listed(server):
    endpoint(server).check()
    server.models = ["tiny-2"]
    with pytest.raises(ModelProblem, match="has no model 'tiny'") as caught:
        endpoint(server).check()
    assert "tiny-2" in caught.value.hint


def test_the_key_is_sent_and_never_said(server, monkeypatch):
    server.key = "secret-of-this-test"
    with pytest.raises(EndpointProblem) as caught:
        endpoint(server).ask(Ask("x"))
    assert "KDTOOL_ENDPOINT_KEY" in caught.value.hint
    monkeypatch.setenv("KDTOOL_ENDPOINT_KEY", "another-key-that-is-wrong")
    with pytest.raises(EndpointProblem) as caught:
        endpoint(server).ask(Ask("x"))
    assert "another-key" not in str(caught.value.as_dict())
    assert "[redacted]" in caught.value.why
    monkeypatch.setenv("KDTOOL_ENDPOINT_KEY", server.key)
    assert texts(endpoint(server).ask(Ask("x"))) == ["x (0)"]


def test_the_key_of_openai_goes_to_openai_alone(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    endpoint(server).ask(Ask("x"))
    assert "Authorization" not in server.headers[0]
    assert EndpointRef.parse("endpoint:https://api.openai.com/v1#gpt").key() == "sk-of-another-server"
    assert EndpointRef.parse("endpoint:https://api.openai.com.example.net/v1#gpt").key() is None


def test_a_key_with_a_line_break_is_refused(server, monkeypatch):
    monkeypatch.setenv("KDTOOL_ENDPOINT_KEY", "one\ntwo")
    with pytest.raises(UsageProblem) as caught:
        endpoint(server)
    assert "two" not in str(caught.value)


def test_works_where_a_loop_runs_already(server):
    async def notebook():
        return endpoint(server).ask(Ask("x"))

    assert texts(asyncio.run(notebook())) == ["x (0)"]


def test_an_exception_of_the_caller_stops_everything(server):
    def stop(number, choices):
        raise KeyError(number)

    with pytest.raises(KeyError):
        endpoint(server).ask_all([Ask("x")] * 50, stop)
    assert len(server.asked) < 30


def test_offline_allows_this_machine_only(server):
    endpoint(server, Run(offline=True)).ask(Ask("x"))
    with pytest.raises(UsageProblem, match="offline is set"):
        Endpoint(EndpointRef.parse("endpoint:https://example.org/v1#m"), Run(offline=True), Sampling())


def test_settings_in_the_environment_are_checked(server, monkeypatch):
    monkeypatch.setenv("KDTOOL_ENDPOINT_DEADLINE", "soon")
    with pytest.raises(UsageProblem, match="KDTOOL_ENDPOINT_DEADLINE=soon"):
        endpoint(server)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("endpoint:", "no http address"),
        ("endpoint:http://host:99999/v1#m", "cannot be read"),
        ("endpoint:ftp://host/v1#m", "no http address"),
        ("endpoint:http://host/v1", "names no model"),
        ("endpoint:http://me:secret@host/v1#m", "no user, password or key"),
        ("endpoint:http://host/v1?api_key=secret#m", "no user, password or key"),
        ("endpoint:http://ho\nst/v1#m", "no http address"),
    ],
)
def test_references_that_are_none(text, said):
    with pytest.raises(UsageProblem, match=said) as caught:
        EndpointRef.parse(text)
    assert "secret" not in str(caught.value.as_dict())


def test_references_round_trip():
    text = "endpoint:http://host:8000/v1#owner/model"
    assert str(EndpointRef.parse(text)) == text
    assert EndpointRef.parse("endpoint:http://host:8000/v1/#m").url == "http://host:8000/v1"
