"""Caches of the likeliest tokens from a server that scores rows: what is asked, what is kept, and what is refused."""

import json

import numpy as np
import pytest
import torch
import transformers

from kdtool import teacher_cache
from kdtool.config import load_config
from kdtool.endpoint import Choice, EndpointRef, Token
from kdtool.endpoint.likely import Scores
from kdtool.errors import ConfigProblem, EndpointProblem, ModelProblem, UsageProblem
from kdtool.mapped import mapped
from kdtool.pipelines import distill
from kdtool.pipelines.setup import make_run
from kdtool.run import Silent
from tests import tiny
from tests.endpoint.server import Fault, Server

QUICK = ["eval.latency=false", "eval.reload=false", "output.plots=false", "train.lr=0.001", "train.batch_size=8"]
QUICK += ["train.log_every=1", "data.max_length=16", "data.task=causal-lm"]
TOKENS = 28
"""Of the vocabulary of the tiny models."""
ROWS = 12


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return tiny.prompt_data(tmp_path_factory.mktemp("prompts"), train=ROWS, test=3)


@pytest.fixture
def server(models, monkeypatch):
    """A server that scores with the tiny teacher."""
    monkeypatch.setenv("KDTOOL_ENDPOINT_BACKOFF", "0.01")
    monkeypatch.setattr(teacher_cache, "CHUNK", 4)
    model = transformers.AutoModelForCausalLM.from_pretrained(models("llama")).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models("llama"))

    def score(ids):
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)

    with Server() as running:
        running.score = score
        running.names = tokenizer.convert_ids_to_tokens(list(range(TOKENS)))
        running.most_tokens = running.gives = TOKENS
        yield running


class Hears(Silent):
    def __init__(self):
        self.said = []

    def info(self, message):
        self.said.append(message)

    warn = info


@pytest.fixture
def train(models, prompts, tmp_path):
    """`train(NAME, TEACHER, ...)`: one epoch; gives the student's bytes, the losses and what was said."""

    def call(name, teacher, *settings, data=None, cache="cache", k=4, method="kd", temperature=1.0):
        options = {"teacher.model": teacher, "student.model": str(models("llama-small")), "method.name": method}
        options |= {"data.source": str(data or prompts), "output.folder": str(tmp_path / name), "train.epochs": 1.0}
        options |= {"train.teacher_cache_top_k": k, "train.teacher_cache_dir": cache and str(tmp_path / cache)}
        own = [] if method in ("none", "sinkd", "fitnet") else [f"method.temperature={temperature}"]
        config = load_config("distill", None, [*QUICK, *own, *settings], options)
        hears = Hears()
        distill(config, make_run(config, hears))
        manifest = json.loads((tmp_path / name / "kdtool.json").read_text())
        return (tmp_path / name / "model.safetensors").read_bytes(), manifest["history"], hears.said

    return call


def held(folder):
    return mapped(folder / "teacher.safetensors", "c")


def asked_for(server):
    """The rows asked about, without the one by which the tokens are checked."""
    return [asked["prompt"] for asked in server.asked if asked.get("return_tokens_as_token_ids")]


def test_it_is_the_cache_of_the_same_model_in_memory(train, server, models, tmp_path):
    server.faults = [Fault(), Fault(429, headers={"Retry-After": "0"}), Fault(cut=0), Fault(503)]
    kept, history, said = train("served", server.reference)
    assert any("answered 429" in line for line in said)
    _, expected, _ = train("local", str(models("llama")), cache="own")
    for near, exact in zip(history, expected, strict=True):
        for name, value in exact["parts"].items():
            assert near["parts"][name] == pytest.approx(value, rel=1e-3)
    ours, theirs = held(tmp_path / "cache"), held(tmp_path / "own")
    assert np.array_equal(ours["ids"], theirs["ids"])
    values = [own["values"].astype(np.float32) for own in (ours, theirs)]
    assert np.abs(values[0] - values[1]).max() <= np.spacing(np.float16(np.abs(values[1]).max()))
    np.testing.assert_allclose(np.exp(ours["rest"]), np.exp(theirs["rest"]), rtol=1e-4, atol=2e-6)
    alone, _, _ = train("alone", f"cache:{tmp_path / 'cache'}", cache=None, k=None)
    assert alone == kept
    row = next(asked for asked in server.asked if asked.get("return_tokens_as_token_ids"))
    assert row.items() >= {"echo": True, "stream": False, "max_tokens": 1, "logprobs": 4, "temperature": 0.0}.items()
    manifest = json.loads((tmp_path / "served" / "kdtool.json").read_text())
    found = manifest["provenance"]["teacher_cache"]
    assert (found["model"], found["endpoint"], found["temperature"]) == ("tiny", server.url, "1.0")


def test_windows_of_plain_text_and_all_tokens(train, server, models, tmp_path):
    texts = tiny.plain_text(tmp_path / "texts", train=12, test=6)
    train("served", server.reference, data=texts, method="supervised-kd", k=TOKENS)
    train("local", str(models("llama")), data=texts, method="supervised-kd", k=TOKENS, cache="own")
    ours, theirs = held(tmp_path / "cache"), held(tmp_path / "own")
    assert np.isneginf(ours["rest"]).all()
    assert np.array_equal(ours["ids"], theirs["ids"])
    assert ours["ids"].shape[0] % 15 == 0


def test_what_was_answered_before_a_failure_is_kept(train, server, tmp_path, monkeypatch):
    monkeypatch.setenv("KDTOOL_ENDPOINT_PARALLEL", "2")
    server.faults = [Fault(times=10), Fault(400, times=99)]
    with pytest.raises(EndpointProblem, match="answered 400"):
        train("out", server.reference)
    assert int((held(tmp_path / "cache")["sums"] != 0).sum()) == 2
    server.faults, server.asked = [], []
    train("out", server.reference)
    assert len(asked_for(server)) == 4
    server.asked = []
    _, _, said = train("again", server.reference, "runtime.seed=1")
    assert not server.asked
    assert any(f"100% of {ROWS} rows are there" in line for line in said)


def test_token_texts_do_where_each_is_one_token(train, server, tmp_path):
    train("by-id", server.reference, cache="ids")
    server.knows_ids = False
    train("by-text", server.reference, cache="texts")
    for name, value in held(tmp_path / "ids").items():
        assert np.array_equal(value, held(tmp_path / "texts")[name])
    server.names[-1] = "nothing"
    with pytest.raises(EndpointProblem, match="names tokens by their texts") as caught:
        train("unknown", server.reference, cache="others", k=TOKENS)
    assert caught.value.why == "none of the student's tokens read 'nothing'"
    assert "--return-tokens-as-token-ids" in str(caught.value.hint)


def test_fewer_tokens_than_asked_for(train, server, tmp_path):
    """What fills up changes nothing: the losses are those of a cache of as many tokens as came."""
    server.gives = 3
    _, history, said = train("few", server.reference, k=9)
    assert any("fewer than 9 tokens" in line for line in said)
    values = held(tmp_path / "cache")["values"]
    assert set(np.isfinite(values).sum(1)) == {3, 4}  # the text's own token comes, too
    assert history[0]["loss"] > 0
    server.gives = TOKENS
    _, whole, _ = train("whole", server.reference, k=TOKENS, cache="all")
    for few, all_ in zip(history, whole, strict=True):
        assert 0 < few["parts"]["kd"] < all_["parts"]["kd"] * 1.001


def test_mistakes_are_one_clear_line(train, server, tmp_path):
    with pytest.raises(UsageProblem, match="an endpoint gives only texts") as caught:
        train("out", server.reference, cache=None)
    assert "--teacher-cache" in str(caught.value.hint)
    with pytest.raises(UsageProblem, match="at temperature 1, and the method wants them at 2") as caught:
        train("out", server.reference, temperature=2.0)
    assert "method.temperature=1" in str(caught.value.hint)
    for method in ("none", "sinkd"):
        with pytest.raises(UsageProblem, match=f"{method} on causal-lm cannot learn from likely tokens alone"):
            train("out", server.reference, method=method)
    assert not server.asked
    server.most_tokens = 3
    with pytest.raises(EndpointProblem, match="answered 400") as caught:
        train("out", server.reference)
    assert "teacher_cache_top_k" in str(caught.value.hint)
    server.most_tokens = TOKENS
    server.names = server.names[:4] + server.names[:3:-1]
    with pytest.raises(ModelProblem, match="other tokens than the student"):
        train("out", server.reference)
    assert not (tmp_path / "out").exists()


def test_another_server_or_k_is_another_cache(train, server, tmp_path):
    train("first", server.reference)
    with pytest.raises(ConfigProblem) as caught:
        train("k", server.reference, k=5)
    assert caught.value.why == "different k"
    server.models.append("other")
    with pytest.raises(ConfigProblem) as caught:
        train("model", server.reference.replace("#tiny", "#other"))
    assert caught.value.why == "different model"
    facts = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert facts["endpoint"] == server.url
    assert "teacher" not in facts  # a server does not say its weights


def scores(models, k=2):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models("llama"))
    return Scores(EndpointRef("http://here", "tiny"), tokenizer, k)


def choice(*places):
    tokens = [Token("token_id:5", 0.0)] + [Token(f"token_id:{own}", 0.0, tuple(top.items())) for own, top in places]
    return Choice("", "length", tokens)


BROKEN = {
    "no echo": (lambda: choice(), EndpointProblem, "gives no log-probabilities of a prompt"),
    "too many": (lambda: choice(*[(6, {"token_id:1": -1.0})] * 4), ModelProblem, "gives back 4 tokens for a row of 3"),
    "others": (lambda: choice(*[(7, {"token_id:1": -1.0})] * 2), ModelProblem, "or others"),
    "none": (lambda: choice((6, {}), (6, {})), EndpointProblem, "no log-probabilities of likely tokens"),
    "no probabilities": (lambda: choice(*[(6, {"token_id:1": 2.0})] * 2), EndpointProblem, "no log-probabilities of"),
    "twice": (lambda: choice(*[(6, {"token_id:1": -1.0, "token_id:01": -2.0})] * 2), EndpointProblem, "no log-prob"),
    "logits": (lambda: choice(*[(6, {"token_id:1": 2000.0})] * 2), EndpointProblem, "no log-probabilities of"),
    "no id": (lambda: choice(*[(6, {"token_id:" + "1" * 5000: -1.0})] * 2), EndpointProblem, "names tokens by their"),
    "not a number": (lambda: choice(*[(6, {"token_id:1": float("nan")})] * 2), EndpointProblem, "no log-prob"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_answers_that_are_none(models, name):
    made, problem, said = BROKEN[name]
    with pytest.raises(problem, match=said):
        scores(models).read(made(), [5, 6, 6], np.ones(2, dtype=bool))


def test_ids_beyond_the_tokenizer_are_among_the_others(models):
    """As large heads have, for a round size."""
    places = [(6, {"token_id:99": -0.5, "token_id:3": -1.0, "token_id:4": -3.0}), (6, {"token_id:6": -1e-9})]
    places.append((6, {"token_id:6": -0.0, "token_id:7": -1e9}))
    reader = scores(models)
    found = reader.read(choice(*places), [5, 6, 6, 6], np.ones(3, dtype=bool))
    assert found["ids"].tolist() == [[3, 3], [6, 6], [6, 7]]
    assert found["values"].tolist() == [[-1.0, -np.inf], [0.0, -np.inf], [0.0, -1e4]]
    assert found["rest"][0] == pytest.approx(np.log(1 - np.exp(-1.0)))
    assert found["rest"][1] == pytest.approx(np.log(2.0**-20))  # not -inf: so little cannot be told from rounding
    assert (reader.few, reader.places) == (2, 3)
