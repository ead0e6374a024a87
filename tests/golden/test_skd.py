"""The family of SKD: token sequences, divergences, pieces of MiniLLM.

Methods: 'skd', 'mixed-skd', 'gkd', 'on-policy', 'supervised-kd', 'imitkd', 'seqkd', 'minillm'.
"""

import re

import pytest
import torch

from kdtool.divergences import Divergence, Head, cross_entropy, divergence
from kdtool.generation import Interleaving, Warp, generate
from kdtool.methods._policy import pieces

from ._cases import Case, cases


def of_kind(kind):
    found = []
    for parameter in cases("skd"):
        case = parameter.values[0]
        if case is None or case.entry["kind"] == kind:
            found.append(parameter)
    return pytest.mark.parametrize("case", found)


class Table:
    """Next-token logits that depend on position and last token."""

    def __init__(self, table):
        self.table = table
        self.read = 0

    def begin(self, ids, mask):
        assert ids.shape[1] == 1

    def feed(self, tokens, positions):
        return self.table[positions.clamp_max(len(self.table) - 1), tokens]

    def keep(self, counts, fed):
        self.read += int(counts.sum())

    def select(self, rows):
        pass


def rolled(case, gamma, copies=1):
    t, h = case.tensors, case.hyper
    settings = Interleaving(
        h["K"], gamma, Warp(h["student_temperature"]), Warp(h["teacher_temperature"]), (h["eos"],), pad=-1
    )
    ids = torch.full((copies, 1), h["first_token"])
    uniform = torch.stack([t["u_student"], t["u_teacher"]]).expand(copies, 2, -1)
    students, teachers = Table(t["student_table"]), Table(t["teacher_table"])
    return generate(students, teachers, ids, torch.ones_like(ids), uniform, settings)


@of_kind("interleaved_sampling")
def test_sequences(case: Case):
    expected = case.tensors["trace"]
    for gamma in {1, 2, 3, case.hyper["gamma"], 7, 64}:
        out = rolled(case, gamma, copies=2)
        for row in range(2):
            found = out.tokens[row][out.valid[row]]
            assert torch.equal(found, case.tensors["tokens"].long()), gamma
            places = torch.arange(len(found))
            trace = torch.stack([places, out.proposed[row], out.kept[row].long(), out.tokens[row]], 1)
            assert torch.equal(trace, expected), gamma
    assert float(out.kept[0].double().mean()) == pytest.approx(case.hyper["acceptance_rate"])


def rows(case):
    chosen = case.tensors["labels"][:, 1:] != -100
    student = case.tensors["student_logits"].clone()
    return chosen, student


@of_kind("losses")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_divergences(case: Case, dtype):
    kind = getattr(torch, dtype)
    names = [name for name in case.tensors if re.fullmatch(r"gjsd_b[\d.]+_t[\d.]+", name)]
    assert names
    for name in names:
        beta, temperature = map(float, re.fullmatch(r"gjsd_b([\d.]+)_t([\d.]+)", name).groups())
        chosen, student = rows(case)
        student = student.to(kind).requires_grad_()
        teacher = case.tensors["teacher_logits"].to(kind)
        which = Divergence("jsd", beta=beta, temperature=temperature)
        loss = divergence(student[:, :-1][chosen], teacher[:, :-1][chosen], which) / chosen.sum()
        loss.backward()
        close = case.tolerance.of(dtype)
        torch.testing.assert_close(loss.detach(), case.tensors[name][0].to(kind), **close)
        torch.testing.assert_close(student.grad, case.tensors[f"{name}.grad"].to(kind), **close)


@of_kind("losses")
def test_cross_entropy_of_sequences(case: Case):
    chosen, student = rows(case)
    student.requires_grad_()
    labels = case.tensors["labels"][:, 1:][chosen]
    loss = cross_entropy(student[:, :-1][chosen], labels) / len(labels)
    loss.backward()
    close = case.tolerance.of("float32")  # plain cross-entropy is computed in float32
    torch.testing.assert_close(loss.detach().double(), case.tensors["seqkd_ce"][0], **close)
    torch.testing.assert_close(student.grad, case.tensors["seqkd_ce.grad"], **close)


@of_kind("minillm")
def test_minillm(case: Case):
    t, h = case.tensors, case.hyper
    mask = t["mask"].bool()
    student = t["student_logits"].clone().requires_grad_()
    head = Head(torch.eye(student.shape[-1], dtype=student.dtype))  # hidden states that are the logits
    found = pieces(
        (student, head),
        (t["teacher_logits"], head),
        t["completion_ids"],
        mask,
        gamma=h["gamma"],
        normalise=h["length_normalization"],
        masked=1e-4,  # as the code has it that the values come from
    )
    torch.testing.assert_close(found.returns, t["advantage"], **case.tolerance.of("minillm.advantage"))
    loss = found.single_step / mask.sum()
    loss.backward()
    close = case.tolerance.of("float64")
    torch.testing.assert_close(loss.detach(), t["single_step"][0], **close)
    torch.testing.assert_close(student.grad, t["single_step.grad"], **close)
