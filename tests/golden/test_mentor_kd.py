"""Mentor-KD: the loss without padding, answers in predictions, target texts."""

import json

import pytest
import torch

from kdtool.divergences import Divergence, Head, compare, divergence
from kdtool.rationales import clean, correct, extract, target

from ._cases import Case, cases, folder

PATH = folder() / "mentor_kd.json"
DOCUMENT = json.loads(PATH.read_text(encoding="utf-8")) if PATH.is_file() else {"answers": [], "targets": []}


@pytest.mark.parametrize("case", cases("mentor_kd"))
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_losses(case: Case, dtype):
    kind, t, h = getattr(torch, dtype), case.tensors, case.hyper
    student = t["student_logits"].clone().to(kind).requires_grad_()
    chosen = t["labels"] != -100
    teacher, labels = t["teacher_logits"].to(kind)[chosen], t["labels"][chosen]
    # logits through an identity as head: the chunked form with both terms
    head = Head(torch.eye(h["V"], dtype=kind))
    which = Divergence("forward-kl", temperature=h["temperature"])
    arguments = (student[chosen], head, (teacher, head), labels, which)
    total, _, _ = compare(*arguments, weight=h["kd_lambda"], ce_weight=1 - h["kd_lambda"], rows=3)
    (total / len(labels)).backward()
    _, ce, kd = compare(*arguments, weight=1.0, ce_weight=1.0, rows=2)
    found = {"ce": ce, "masked_kd": kd, "masked_total": total.detach()}
    close = case.tolerance.of(dtype)
    for name, value in found.items():
        torch.testing.assert_close(value / len(labels), t[name][0].to(kind), **close, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(student.grad, t["masked_grad"].to(kind), **close)
    dense = divergence(student.detach()[chosen], teacher, Divergence(temperature=h["temperature"]))
    torch.testing.assert_close(dense / len(labels), t["masked_kd"][0].to(kind), **close)


@pytest.mark.parametrize("row", DOCUMENT["answers"], ids=lambda row: f"{row['dataset']}: {row['prediction']}")
def test_answers(row):
    found, gold = extract(row["prediction"], row["dataset"]), clean(row["gold"], row["dataset"])
    assert str(found) == str(row["extracted"])
    assert str(gold) == str(row["gold_cleaned"])
    assert correct(found, gold, row["dataset"]) == row["correct"]


@pytest.mark.parametrize("row", DOCUMENT["targets"], ids=lambda row: row["target"])
def test_targets(row):
    assert target(row["chain"], row["answer"]) == row["target"]
