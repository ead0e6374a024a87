"""Caches of the likeliest tokens: what they hold, what they cost, and runs without a teacher."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from kdtool import teacher_cache
from kdtool.config import load_config
from kdtool.divergences import TopK
from kdtool.errors import ConfigProblem, UsageProblem
from kdtool.pipelines import distill
from kdtool.pipelines.setup import make_run
from kdtool.run import Run
from kdtool.tasks._base import ROWS, VIEW
from kdtool.teacher_cache import Kept, TeacherCache, fingerprint
from tests import tiny
from tests.kits import make_kit

QUICK = ["eval.latency=false", "eval.reload=false", "output.plots=false", "train.lr=0.001", "train.batch_size=8"]
QUICK += ["train.log_every=1", "data.max_length=8", "method.temperature=2"]
TOKENS = 28
"""Of the vocabulary of the tiny models."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return tiny.plain_text(tmp_path_factory.mktemp("texts"), train=24, test=4)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return tiny.prompt_data(tmp_path_factory.mktemp("prompts"), train=21, test=4)


@pytest.fixture
def train(models, texts, tmp_path):
    """`train(NAME, ...)`: one epoch; gives the student's bytes and the losses."""

    def call(name, *settings, teacher="llama", student="llama-small", data=None, cache=None, k=None, method="kd"):
        reference = teacher if teacher is None or teacher.startswith("cache:") else str(models(teacher))
        options = {"teacher.model": reference, "student.model": str(models(student)), "method.name": method}
        options |= {"data.source": str(data or texts), "output.folder": str(tmp_path / name), "train.epochs": 1.0}
        options |= {"train.teacher_cache_top_k": k, "train.teacher_cache_dir": cache and str(tmp_path / cache)}
        config = load_config("distill", None, [*QUICK, *settings], options)
        distill(config, make_run(config))
        history = json.loads((tmp_path / name / "kdtool.json").read_text())["history"]
        return (tmp_path / name / "model.safetensors").read_bytes(), history

    return call


@pytest.mark.parametrize("kind", ["texts", "prompts"])
def test_a_cache_stands_for_its_teacher(train, tmp_path, request, kind):
    """The run that fills it, and the one that has nothing else, end with the same weights."""
    data = request.getfixturevalue(kind)
    filled, _ = train("filled", "data.max_length=16", data=data, cache="cache", k=4)
    alone, _ = train("alone", "data.max_length=16", data=data, teacher=f"cache:{tmp_path / 'cache'}")
    assert alone == filled
    manifest = json.loads((tmp_path / "alone" / "kdtool.json").read_text())
    assert manifest["config"]["teacher"] == manifest["config"]["teacher"] | {
        "model": None,
        "cache": str(tmp_path / "cache"),
    }


def test_all_tokens_kept_are_the_teacher_but_for_their_half_precision(train):
    _, whole = train("whole", "train.teacher_cache=false")
    _, kept = train("kept", cache="cache", k=TOKENS)
    _, fewer = train("fewer", cache="other", k=2)
    for exact, near in zip(whole, kept, strict=True):
        assert near["parts"]["kd"] == pytest.approx(exact["parts"]["kd"], rel=5e-3)
        assert near["parts"]["ce"] == pytest.approx(exact["parts"]["ce"], rel=1e-4)
    assert fewer[0]["parts"]["kd"] < 0.9 * whole[0]["parts"]["kd"]


def test_what_does_not_fit_is_refused_in_one_line(train, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "CHUNK", 4)
    folder = tmp_path / "cache"
    with pytest.raises(UsageProblem, match="there is no teacher cache") as caught:
        train("none", teacher=f"cache:{folder}")
    assert "teacher_cache_top_k" in str(caught.value.hint)
    train("filled", cache="cache", k=4)
    there = f"cache:{folder}"
    with pytest.raises(ConfigProblem, match="does not fit this run") as caught:
        train("hotter", "method.temperature=3", teacher=there)
    assert caught.value.why == "different temperature (2.0 there, 3.0 here)"
    with pytest.raises(ConfigProblem, match="does not fit this run") as caught:
        train("shorter", "data.max_length=6", teacher=there)
    assert caught.value.why == "different data"
    with pytest.raises(UsageProblem, match="sinkd on causal-lm cannot learn from likely tokens alone"):
        train("sinkd", teacher=there, method="sinkd")
    marks = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps(marks | {"tokenizer": "0"}))
    with pytest.raises(ConfigProblem) as caught:
        train("other", teacher=there)
    assert caught.value.why == "different tokenizer"
    train("few", "train.max_steps=1", cache="part", k=4)
    with pytest.raises(ConfigProblem, match=r"holds \d+% of the rows, and there is no teacher to ask"):
        train("half", teacher=f"cache:{tmp_path / 'part'}")
    train("full", cache="full")
    with pytest.raises(UsageProblem, match="cannot stand for its teacher") as caught:
        train("logits", teacher=f"cache:{tmp_path / 'full'}")
    assert caught.value.why == "it holds whole logits"


def test_another_k_or_temperature_is_another_cache(train):
    train("first", cache="cache", k=4)
    for name, settings, k in (("k", (), 5), ("temperature", ("method.temperature=3",), 4)):
        with pytest.raises(ConfigProblem) as caught:
            train(name, *settings, cache="cache", k=k)
        assert caught.value.why == f"different {name}"


# One cache


@pytest.fixture(scope="module")
def kit(models, texts):
    return make_kit("causal-lm", models, lambda _name: texts)


def open_cache(kit, folder, k=3, teacher=True):
    kept = Kept(k, 2.0)
    marks = fingerprint(kit.teacher, kit.train, Run(offline=True), "words", None, kept)
    run = Run(offline=True)
    return TeacherCache(folder, kit.task, kit.teacher if teacher else None, kit.train, run, 0, marks, 2**30, None, kept)


def everything(kit, cache):
    return cache.get(torch.arange(len(kit.train)))


def test_it_holds_the_likeliest_tokens_of_the_teacher(kit, tmp_path):
    found = everything(kit, open_cache(kit, tmp_path))
    logits = kit.task.forward(kit.teacher.model, kit.batch(list(range(len(kit.train))))).logits
    expected = TopK.of(logits, 3, 2.0)
    assert torch.equal(found.ids.long(), expected.ids)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.rest, expected.rest, rtol=1e-4, atol=1e-4)
    mass = found.log_probs.exp().sum(-1) + found.rest.exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=2e-3)


def test_the_file_says_what_it_is_and_takes_six_bytes_an_entry(kit, tmp_path):
    cache = open_cache(kit, tmp_path)
    everything(kit, cache)
    path = tmp_path / "teacher.safetensors"
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        values = file.get_tensor("values")
        assert (values.dtype, file.get_tensor("ids").dtype) == (torch.float16, torch.int32)
    assert facts["k"] == "3"
    assert facts["temperature"] == "2.0"
    assert facts["model"] == kit.teacher.ref
    assert len(facts["tokenizer"]) == 64
    units = len(kit.train) * 7
    assert values.shape == (units, 3)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header == units * (3 * 6 + 4) + 4 * len(cache.chunks)


def test_many_files_are_as_one(kit, tmp_path, monkeypatch):
    one = everything(kit, open_cache(kit, tmp_path / "one"))
    monkeypatch.setattr(teacher_cache, "_SHARD", 500)
    cache = open_cache(kit, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("teacher-*-of-*.safetensors"))) > 2
    several = everything(kit, cache)
    again = everything(kit, open_cache(kit, tmp_path / "many", teacher=False))
    for found in (several, again):
        for name in ("log_probs", "ids", "rest"):
            assert torch.equal(getattr(found, name), getattr(one, name))
    order = torch.tensor([5, 0, 3])
    some = cache.get(order)
    places = np.concatenate([np.arange(7 * i, 7 * i + 7) for i in order.tolist()])
    assert torch.equal(some.ids, one.ids[places])
    next((tmp_path / "many").glob("teacher-00002*")).unlink()
    with pytest.raises(ConfigProblem, match="damaged"):
        open_cache(kit, tmp_path / "many", teacher=False)


def test_without_a_teacher_damage_is_an_error(kit, tmp_path):
    everything(kit, open_cache(kit, tmp_path))
    path = tmp_path / "teacher.safetensors"
    content = bytearray(path.read_bytes())
    content[-2:] = bytes(byte ^ 255 for byte in content[-2:])
    path.write_bytes(content)
    with pytest.raises(ConfigProblem, match="damaged") as caught:
        everything(kit, open_cache(kit, tmp_path, teacher=False))
    assert caught.value.why == "a checksum does not fit"
    everything(kit, open_cache(kit, tmp_path))  # with one it is made again
    everything(kit, open_cache(kit, tmp_path, teacher=False))


def test_a_step_with_a_cache_never_runs_the_teacher(kit, tmp_path, monkeypatch):
    method = kit.build("kd", temperature=2.0).eval()
    method.caches[0] = open_cache(kit, tmp_path, TOKENS)
    everything(kit, method.caches[0])
    batch = kit.batch([4, 1])
    live = method(batch, 0.0)
    monkeypatch.setattr(method.teacher_list[0].model, "forward", pytest.fail)
    monkeypatch.setattr(method.teacher_list[0].model.base_model, "forward", pytest.fail)
    cached = method(batch | {VIEW: batch[ROWS]}, 0.0)
    torch.testing.assert_close(cached.total, live.total, rtol=5e-3, atol=1e-3)
