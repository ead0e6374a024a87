"""The teacher cache in whole runs: who fills it, and when, leaves no trace in the student."""

import errno
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from kdtool import teacher_cache
from kdtool.config import load_config
from kdtool.errors import ConfigProblem, OutputProblem, UsageProblem
from kdtool.pipelines import distill
from kdtool.pipelines.setup import make_run
from kdtool.run import Run, Silent
from kdtool.teacher_cache import TeacherCache, fingerprint
from tests import tiny
from tests.kits import make_kit

ROWS = 80
QUICK = ["eval.latency=false", "eval.reload=false", "output.plots=false", "train.lr=0.001", "train.batch_size=8"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny.text_data(tmp_path_factory.mktemp("rows"), train=ROWS)


class Listens(Silent):
    def __init__(self):
        self.said = []

    def info(self, message):
        self.said.append(message)


@pytest.fixture
def train(models, rows, tmp_path):
    """`train(NAME, ...)`: distil two epochs; gives the student's bytes and what was said."""

    def call(name, *settings, teacher="bert", cache="shared", seed=0, steps=20, method="kd"):
        options = {"teacher.model": str(models(teacher)), "student.model": "layers:1", "data.source": str(rows)}
        options |= {"method.name": method, "output.folder": str(tmp_path / name), "runtime.seed": seed}
        options |= {"train.max_steps": steps, "train.teacher_cache_dir": str(tmp_path / cache) if cache else None}
        config = load_config("distill", None, [*QUICK, *settings], options)
        listens = Listens()
        distill(config, make_run(config, listens))
        return (tmp_path / name / "model.safetensors").read_bytes(), listens.said

    return call


def test_cold_warm_and_half_filled_are_equal(train):
    cold, said = train("cold")
    assert "teacher cache: 0% of 80 rows are there" in said
    warm, said = train("warm")
    assert "teacher cache: 100% of 80 rows are there" in said
    train("part", cache="other", steps=1)
    half, said = train("half", cache="other")
    share = next(message for message in said if message.startswith("teacher cache"))
    assert share not in ("teacher cache: 0% of 80 rows are there", "teacher cache: 100% of 80 rows are there")
    assert cold == warm == half


def test_other_seeds_and_other_settings_share_a_cache(train):
    """What the first run filled is what each of the others would have filled."""
    train("first")
    for name, more in (("seed", {"seed": 1}), ("method", {"method": "logit-mse"})):
        shared, said = train(name, **more)
        assert "teacher cache: 100% of 80 rows are there" in said
        own, _ = train(f"{name}-own", cache=name, **more)
        assert shared == own
    shared, _ = train("temperature", "method.temperature=2.0", "train.batch_size=16")
    own, _ = train("temperature-own", "method.temperature=2.0", "train.batch_size=16", cache="third")
    assert shared == own


def test_without_a_cache_only_rounding_differs(train, tmp_path):
    train("with")
    train("without", "train.teacher_cache=false", cache=None)
    left, right = (json.loads((tmp_path / name / "kdtool.json").read_text())["history"] for name in ("with", "without"))
    assert [row["loss"] for row in left] == pytest.approx([row["loss"] for row in right], rel=1e-4)


def test_a_run_with_another_teacher_is_refused_before_training(train):
    train("first")
    with pytest.raises(ConfigProblem, match="made for another run") as caught:
        train("second", teacher="bert-small")
    assert "teacher" in str(caught.value.why)
    assert "--teacher-cache" in str(caught.value.hint)


def test_a_limit_names_the_options_and_alone_only_switches_the_cache_off(train, monkeypatch):
    monkeypatch.setattr(teacher_cache, "_unit_bytes", lambda width, kept: 2**30)
    with pytest.raises(UsageProblem, match=r"would take 81,920 MiB, more than the 4,096 MiB allowed") as caught:
        train("asked for")
    assert "teacher_cache_limit" in str(caught.value.hint)
    assert "--no-teacher-cache" in str(caught.value.hint)
    _, said = train("by default", cache=None)
    assert any(message.startswith("no teacher cache: the teacher cache would take") for message in said)


# One cache


@pytest.fixture(scope="module")
def kit(models, rows):
    return make_kit("text-classification", models, lambda _name: rows)


def marks_of(kit, **more):
    given = {"teacher": kit.teacher, "data": kit.train, "run": Run(offline=True), "processor": "words"} | more
    return fingerprint(**given)


def open_cache(kit, folder, **more):
    return TeacherCache(
        folder, kit.task, kit.teacher, kit.train, Run(offline=True), 0, marks_of(kit, **more), limit=2**30
    )


def other_teacher(kit):
    changed = kit.copy(kit.teacher)
    with torch.no_grad():
        next(changed.model.parameters()).view(-1)[0] += 1e-3
    return {"teacher": changed}


DIFFERENT = {
    "teacher": other_teacher,
    "data": lambda kit: {"data": kit.train.select(range(ROWS - 1))},
    "processor": lambda kit: {"processor": "other words"},
    "precision": lambda kit: {"run": Run(offline=True, dtype="bfloat16")},
}


@pytest.mark.parametrize("part", DIFFERENT)
def test_what_differs_is_named_and_nothing_else(kit, tmp_path, part):
    open_cache(kit, tmp_path)
    with pytest.raises(ConfigProblem) as caught:
        open_cache(kit, tmp_path, **DIFFERENT[part](kit))
    assert caught.value.why == f"different {part}"


def fill(kit, folder):
    cache = open_cache(kit, folder)
    return cache.get(torch.arange(ROWS))


def test_the_file_is_ordinary_safetensors(kit, tmp_path):
    logits = fill(kit, tmp_path)
    with safe_open(tmp_path / "teacher.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("logits"), logits)
        assert bool((file.get_tensor("sums") != 0).all())


def chunks_computed(kit, cache, monkeypatch):
    counted = []
    real = cache._run_teacher
    monkeypatch.setattr(cache, "_run_teacher", lambda rows: counted.append(len(rows)) or real(rows))
    logits = cache.get(torch.arange(ROWS))
    return logits, counted


def test_each_row_is_computed_once(kit, tmp_path, monkeypatch):
    cache = open_cache(kit, tmp_path)
    _, counted = chunks_computed(kit, cache, monkeypatch)
    assert sum(counted) == ROWS
    _, counted = chunks_computed(kit, cache, monkeypatch)
    assert counted == []


def test_a_damaged_chunk_is_computed_again(kit, tmp_path, monkeypatch):
    """Such as a power cut leaves it: the checksum on disk, the values not."""
    whole = fill(kit, tmp_path)
    path = tmp_path / "teacher.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start : start + 12] = bytes(12)
    path.write_bytes(content)
    logits, counted = chunks_computed(kit, open_cache(kit, tmp_path), monkeypatch)
    assert torch.equal(logits, whole)
    assert len(counted) == 1
    assert chunks_computed(kit, open_cache(kit, tmp_path), monkeypatch)[1] == []


def test_a_file_cut_short_is_made_anew(kit, tmp_path, monkeypatch):
    whole = fill(kit, tmp_path)
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    logits, counted = chunks_computed(kit, open_cache(kit, tmp_path), monkeypatch)
    assert torch.equal(logits, whole)
    assert sum(counted) == ROWS


def forbid(monkeypatch, owner, name, refused):
    """Make a call fail as on a read-only disk; permissions alone do not stop every user."""
    real = getattr(owner, name)

    def call(*args, **kwargs):
        if refused(*args, **kwargs):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def test_a_read_only_cache_is_read_and_what_it_lacks_is_not_kept(kit, tmp_path, monkeypatch):
    whole = fill(kit, tmp_path / "whole")
    open_cache(kit, tmp_path / "part").get(torch.arange(3))
    forbid(monkeypatch, np, "memmap", lambda *_args, mode, **_more: mode == "r+")
    assert chunks_computed(kit, open_cache(kit, tmp_path / "whole"), monkeypatch)[1] == []
    before = (tmp_path / "part" / "teacher.safetensors").read_bytes()
    logits, counted = chunks_computed(kit, open_cache(kit, tmp_path / "part"), monkeypatch)
    assert counted
    assert torch.equal(logits, whole)
    assert (tmp_path / "part" / "teacher.safetensors").read_bytes() == before


def test_where_nothing_can_be_written_one_line_says_so(kit, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputProblem, match="cannot be written") as caught:
        open_cache(kit, tmp_path / "file" / "cache")
    assert "--no-teacher-cache" in str(caught.value.hint)
    forbid(monkeypatch, type(tmp_path), "mkdir", lambda *_args, **_more: True)
    with pytest.raises(OutputProblem, match="cannot be written") as caught:
        open_cache(kit, tmp_path / "new")
    assert caught.value.why == "Read-only file system"
