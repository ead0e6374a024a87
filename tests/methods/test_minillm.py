"""MiniLLM: the objective against one written out, the mixture it samples from, the text it keeps in mind."""

import pytest
import torch

from kdtool.divergences import Head
from kdtool.methods._policy import clipped, log_probs, pieces
from kdtool.tasks._writing import Writing
from kdtool.train.state import seed_everything
from tests import tiny
from tests.kits import gradients, make_kit


@pytest.fixture(scope="module")
def kit(models, data):
    return make_kit("causal-lm", models, data, "prompts")


def logits(seed, rows=2, length=6, size=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, size, generator=generator, dtype=torch.float64)


def test_objective_is_the_one_written_out():
    own, there, size = logits(0).requires_grad_(), logits(1), 7
    ids = torch.randint(0, size, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]]).bool()
    log_b = torch.log(0.3 * there.softmax(-1) + 0.7 * own.detach().softmax(-1)).gather(-1, ids[..., None])[..., 0]
    head = Head(torch.eye(size, dtype=torch.float64))
    found = pieces((own, head), (there, head), ids, mask, log_b[mask], gamma=0.9, clip=0.05)
    expected = own.new_zeros(())
    log_q, log_p = (z.log_softmax(-1).gather(-1, ids[..., None])[..., 0] for z in (own, there))
    outside = 0
    for row in range(2):
        places = mask[row].nonzero()[:, 0].tolist()
        for t in places:
            later = [k for k in places if k > t]
            if not later:
                continue
            reward = sum(0.9 ** (k - t - 1) * float((log_p - log_q)[row, k].detach()) for k in later)
            size_of = sum(0.9 ** (k - t - 1) for k in later)
            ratio = (log_q[row, t] - log_b[row, t]).exp()
            outside += abs(float(ratio.detach()) - 1) > 0.05
            advantage = reward / size_of
            expected = expected - torch.min(ratio * advantage, ratio.clamp(0.95, 1.05) * advantage)
    assert outside > 1
    torch.testing.assert_close(found.policy, expected)
    left, right = (torch.autograd.grad(one, own, retain_graph=True)[0] for one in (found.policy, expected))
    torch.testing.assert_close(left, right)
    assert left.any()


def test_log_probabilities_by_chunks_are_those_of_all_logits():
    hidden = logits(3, 1, 20, 5)[0].requires_grad_()
    weight = logits(4, 1, 9, 5)[0].requires_grad_()
    labels = torch.arange(20) % 9
    values = []
    for rows in (3, 64):
        found = log_probs(hidden, Head(weight), labels, rows)
        values.append((found.detach(), *torch.autograd.grad((found * torch.arange(20)).sum(), (hidden, weight))))
    plain = (hidden @ weight.T).log_softmax(-1)[torch.arange(20), labels]
    values.append((plain.detach(), *torch.autograd.grad((plain * torch.arange(20)).sum(), (hidden, weight))))
    for one, two, three in zip(*values, strict=True):
        torch.testing.assert_close(one, three)
        torch.testing.assert_close(two, three)


def test_clipped_weights_have_no_gradient():
    log_q = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.0], requires_grad=True)
    loss = clipped(log_q, torch.zeros(5), torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]), 0.2)
    loss.sum().backward()
    assert log_q.grad.ne(0).tolist() == [False, True, True, False, True]


def test_terms_add_up_and_identical_models_have_none(kit):
    batch = kit.batch([0, 1, 2, 3])
    seed_everything(1)
    method = kit.build("minillm", same=True, ce_weight=0.0).eval()
    losses = method.step(batch, 0.5)
    assert abs(float(losses.total.detach())) < 1e-4
    losses.total.backward()
    assert max(float(g.abs().max()) for g in gradients(method).values()) < 1e-4
    method = kit.build("minillm", single_step=0.5, ce_weight=2.0).eval()
    losses = method.step(batch, 0.5)
    parts = losses.parts
    expected = parts["policy"] + 0.5 * parts["kd"] + 2.0 * parts["ce"]
    torch.testing.assert_close(losses.total.detach(), expected.float(), rtol=1e-5, atol=1e-5)


def test_without_the_teachers_share_texts_are_the_students(kit):
    batch = kit.batch([0, 1, 2, 3])
    found = {}
    for mix in (0.0, 0.9):
        seed_everything(1)
        method = kit.build("minillm", teacher_mix=mix).eval()
        seen = []
        method.write, write = lambda *a, **k: seen.append(write(*a, **k)) or seen[-1], method.write  # noqa: B023
        method.step(batch, 0.5)
        found[mix] = seen[0].ids
    seed_everything(1)
    alone = kit.build("on-policy").eval().sampled(batch, 0.5).ids
    assert torch.equal(found[0.0], alone)
    assert not torch.equal(found[0.9], alone)


def test_pretraining_text_is_read_in_windows(kit, tmp_path):
    tiny.plain_text(tmp_path)
    batch = kit.batch([0, 1, 2])
    seed_everything(1)
    kit.task.writing = Writing(7, ("END",))
    method = kit.build("minillm", pretraining_text=str(tmp_path)).eval()
    assert method.task.writing == Writing(7, ("END",)), "what is scored afterwards is written as the run was told"
    assert method.windows.columns["input_ids"].shape[1] == kit.batch([0, 1])["input_ids"].shape[1]
    texts = [method._drawn(method.windows, batch, at) for at in (0.25, 0.25, 0.5)]
    assert torch.equal(texts[0].ids, texts[1].ids)
    assert not torch.equal(texts[0].ids, texts[2].ids)
    assert texts[0].counts.all()
    own, other = kit.build("minillm").eval().step(batch, 0.5), method.step(batch, 0.5)
    assert float(own.parts["ce"]) != float(other.parts["ce"])
    assert float(own.parts["policy"]) == pytest.approx(float(other.parts["policy"]), abs=1e-4)
