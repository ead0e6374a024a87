"""Mentor-KD: what its loss counts, and what becomes of the data before it."""

import json

import pytest
import torch

from kdtool.config import load_config
from kdtool.data.examples import DataSplits, Examples
from kdtool.errors import UsageProblem
from kdtool.methods._base import Work
from kdtool.models import Loaded, load_model
from kdtool.pipelines.setup import load_processor
from kdtool.registry import METHODS, TASKS
from kdtool.run import Run, Silent
from kdtool.tasks._base import to_device
from tests import chains
from tests.kits import gradients


@pytest.fixture(scope="module")
def spellers(tmp_path_factory):
    """A mentor and a student over bytes, and a mentor that numbers bytes otherwise."""
    root, run, task = tmp_path_factory.mktemp("spellers"), Run(), TASKS.get("causal-lm")()
    made = {}
    for name, options in {"student": {"seed": 1}, "mentor": {"seed": 2}, "other": {"seed": 3, "reverse": True}}.items():
        made[name] = load_model(str(chains.speller(root / name, **options)), task.auto_class, run)
        load_processor(made[name], task, run)
    return made


def rows():
    return Examples({"prompt": ["What is 1 and 1?", "And 2 and 20?"], "response": ["a --> 2", "a longer one --> 22"]})


def build(spellers, mentor="mentor", name="mentor-kd", **values):
    task = TASKS.get("causal-lm")()
    student, teacher = spellers["student"], spellers[mentor]
    teachers = [] if name == "none" else [teacher]
    method = METHODS.get(name)(METHODS.build_config(name, values), student, teachers, task)
    encoded = task.encode(rows(), student, load_config("distill"), Run())
    return method, task, encoded


def losses(method, batch):
    method.zero_grad(set_to_none=True)
    found = method(batch, 0.5)
    (found.total / found.count).backward()
    return found, {name: grad.clone() for name, grad in gradients(method).items()}


def test_without_the_mentor_it_is_plain_fine_tuning_bit_for_bit(spellers):
    method, task, encoded = build(spellers, kd_lambda=0.0)
    batch = task.collate([encoded[i] for i in range(2)])
    found, grads = losses(method, batch)
    plain, expected = losses(build(spellers, name="none")[0], batch)
    assert torch.equal(found.total, plain.total)
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


def test_with_the_mentor_alone_labels_are_only_a_mask(spellers):
    method, task, encoded = build(spellers, kd_lambda=1.0)
    batch = task.collate([encoded[i] for i in range(2)])
    found, grads = losses(method, batch)
    counted = batch["labels"] != -100
    other = batch | {"labels": torch.where(counted, torch.full_like(batch["labels"], 7), batch["labels"])}
    again, same = losses(method, other)
    assert torch.equal(found.total, again.total)
    assert all(torch.equal(grads[name], same[name]) for name in grads)


@pytest.mark.parametrize("kd_lambda", [0.0, 0.3, 1.0])
def test_padding_changes_nothing(spellers, kd_lambda):
    method, task, encoded = build(spellers, kd_lambda=kd_lambda)
    batch = task.collate([encoded[0]])
    wide = {key: torch.nn.functional.pad(value, (0, 9), value=-100 * (key == "labels")) for key, value in batch.items()}
    (found, grads), (again, same) = losses(method, batch), losses(method, wide)
    assert int(found.count) == int(again.count)
    torch.testing.assert_close(again.total, found.total, rtol=1e-5, atol=1e-5)
    for name in grads:
        torch.testing.assert_close(same[name], grads[name], rtol=1e-4, atol=1e-6)


def test_a_token_with_number_0_counts(spellers):
    # the published mask is labels != 0, which loses it
    method, task, encoded = build(spellers)
    batch = to_device(task.collate([encoded[0]]), "cpu")
    place = int((batch["labels"][0] != -100).nonzero()[0])
    zero = {key: value.clone() for key, value in batch.items()}
    zero["labels"][0, place] = zero["input_ids"][0, place] = 0
    assert int(losses(method, zero)[0].count) == int(losses(method, batch)[0].count)


# What is made before training


class Hears(Silent):
    def __init__(self):
        self.said = []

    def info(self, message):
        self.said.append(message)

    warn = info


def prepare(spellers, folder, mentor="mentor", teacher=None, **values):
    """`prepare` of a method on sums; what the mentor is fitted on is kept under `fitted`."""
    config = load_config("distill", None, ["eval.answers=svamp"], {"method.name": "mentor-kd", "data.source": "sums"})
    config.teacher.model = str(teacher or chains.teacher_file(folder / "teacher.jsonl", chains.sums(8)))
    hears, fitted = Hears(), []
    run = Run(reporter=hears)
    values = {"mentor": "m", **values}
    method = METHODS.get("mentor-kd")(
        METHODS.build_config("mentor-kd", values), spellers["student"], [], TASKS.get("causal-lm")()
    )
    work = Work(
        folder / "made", config, run, None, None, lambda reference, rows, *_: fitted.append(rows) or spellers[mentor]
    )
    source = chains.sums(8)
    data = Examples({"prompt": [row["question"] for row in source], "response": [row["answer"] for row in source]})
    made = method.prepare(DataSplits(data, None, data, None, {}, {}), work)
    return method, made, work, fitted, hears.said


def test_a_planted_wrong_rationale_reaches_neither_mentor_nor_student(spellers, tmp_path):
    planted = [{**row, "rationale": f"planted {i}", "correct": False} for i, row in enumerate(chains.sums(8))]
    planted.append({**chains.sums(8)[0], "answer": "99", "rationale": "planted elsewhere", "correct": True})
    planted.append({"question": "Of the test?", "answer": "1", "rationale": "planted in the test", "correct": True})
    teacher = chains.teacher_file(tmp_path / "planted.jsonl", chains.sums(8), planted)
    augmented = chains.teacher_file(tmp_path / "more.jsonl", [], planted)
    _, made, work, fitted, _ = prepare(spellers, tmp_path, teacher=teacher, augmented=str(augmented))
    (seen,) = fitted
    for examples in (seen, made.train):
        assert len(examples) == 16
        assert not any("planted" in text for text in examples.columns["response"])
        assert examples.columns["response"][0] == "Way 0: count on to 0. --> 0"
    assert work.facts["annotate"] == {"rows": 25, "right": 16, "questions": 8, "answered": 8}
    lines = [json.loads(line) for line in (work.folder / "train.jsonl").read_text().splitlines()]
    assert {line["source"] for line in lines} == {"teacher"}


def test_rationales_of_both_are_joined_without_repetition(spellers, tmp_path):
    more = [{**chains.sums(8)[3], "rationale": "Another way.", "correct": True}]
    augmented = chains.teacher_file(tmp_path / "more.jsonl", chains.sums(1), more)
    _, made, work, _, _ = prepare(spellers, tmp_path, augmented=str(augmented))
    assert len(made.train) == 17
    assert work.facts["train"] == {"teacher": 16, "mentor": 1}
    _, made, _, _, _ = prepare(
        spellers, tmp_path / "all", augmented=str(augmented), distinct=False, teacher=tmp_path / "teacher.jsonl"
    )
    assert len(made.train) == 19


def test_only_as_many_as_asked_for_are_kept(spellers, tmp_path):
    _, made, _, _, _ = prepare(spellers, tmp_path, n_keep=1, n_aug=0)
    assert len(made.train) == 8
    assert made.test.columns["response"] == [row["answer"] for row in chains.sums(8)]


def test_ablations_need_no_mentor_where_they_do_not_use_one(spellers, tmp_path):
    method, _, work, fitted, _ = prepare(spellers, tmp_path, n_aug=0, kd_lambda=0.0, mentor=None)
    assert not fitted
    assert not method.teacher_list
    assert list(work.facts) == ["annotate", "filter", "train"]
    method, _, _, fitted, _ = prepare(spellers, tmp_path / "sld", n_aug=0)
    assert len(fitted) == 1
    assert method.teacher_list == [spellers["mentor"]]


@pytest.mark.parametrize("values", [{}, {"n_aug": 0}, {"kd_lambda": 0.0}])
def test_a_missing_mentor_is_said(spellers, values):
    with pytest.raises(UsageProblem, match="no mentor"):
        METHODS.get("mentor-kd")(METHODS.build_config("mentor-kd", values), spellers["student"], [], None)


def test_a_mentor_with_other_tokens_only_writes(spellers, tmp_path):
    method, _, work, _, said = prepare(spellers, tmp_path, mentor="other", n_aug=0)
    assert any("different tokenizers" in line for line in said)
    assert work.facts["distill"] == {"kd_lambda": 0.0}
    assert not method.teacher_list
    assert not method.soft


def test_heads_padded_to_other_sizes_are_cut(spellers):
    wide = Loaded(
        spellers["mentor"].model.__class__(spellers["mentor"].model.config), spellers["mentor"].processor, "w"
    )
    wide.model.resize_token_embeddings(300)
    method, task, encoded = build({**spellers, "wide": wide}, mentor="wide")
    found, _ = losses(method, task.collate([encoded[0]]))
    assert torch.isfinite(found.total)
