"""The divergences of language models: formulas, and the chunked form against logits held as a whole."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from kdtool.divergences import (
    KINDS,
    Adapter,
    Divergence,
    Head,
    Sinkhorn,
    TopK,
    _chunked,
    compare,
    compare_all,
    divergence,
    head_of,
    sinkhorn_distance,
)

ROWS, WIDTH, WIDER, TOKENS = 7, 4, 6, 11


def formula(kind, z_s, z_t, beta=0.3, skew=0.2, temperature=1.7):
    q, p = (z_s / temperature).softmax(-1), (z_t / temperature).softmax(-1)

    def kl(a, b):
        return (a * (a.log() - b.log())).sum()

    m = beta * p + (1 - beta) * q
    return {
        "forward-kl": lambda: kl(p, q),
        "reverse-kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "tvd": lambda: 0.5 * (p - q).abs().sum(),
        "skewed-kl": lambda: kl(p, skew * p + (1 - skew) * q),
        "skewed-reverse-kl": lambda: kl(q, (1 - skew) * p + skew * q),
        "cross-entropy": lambda: -(p * q.log()).sum(),
    }[kind]()


def normals(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def made(dtype=torch.float64):
    normal = normals(dtype)
    hidden, matrix, bias = normal(ROWS, WIDTH), normal(TOKENS, WIDTH), normal(TOKENS)
    labels = torch.randint(TOKENS, (ROWS,), generator=torch.Generator().manual_seed(1))
    leaves = [value.requires_grad_() for value in (hidden, matrix, bias)]
    return leaves, (normal(ROWS, WIDER), Head(normal(TOKENS, WIDER))), labels


def logits_of(side):
    return side[1].logits(side[0])


@pytest.mark.parametrize("kind", KINDS)
def test_dense_form_is_the_formula_and_its_derivative(kind):
    (hidden, matrix, _), teacher, _ = made()
    z_s, z_t = (hidden @ matrix.T).detach().requires_grad_(), logits_of(teacher)
    before = z_t.clone()
    expected = formula(kind, z_s, z_t)
    (grad,) = torch.autograd.grad(expected, z_s)
    found = divergence(z_s, z_t, Divergence(kind, 0.3, 0.2, 1.7))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * found, z_s)[0], 3 * grad)
    assert torch.equal(z_t, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, 3.0)])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_chunked_form_is_the_formula(kind, scale, cap, rows):
    (hidden, matrix, bias), teacher, labels = made()
    z = (hidden @ matrix.T + bias) * scale
    z = z if cap is None else cap * torch.tanh(z / cap)
    apart, ce = formula(kind, z, logits_of(teacher)), functional.cross_entropy(z, labels, reduction="sum")
    expected = 0.7 * apart + 0.4 * ce
    gradients = torch.autograd.grad(expected, (hidden, matrix, bias))
    which = Divergence(kind, 0.3, 0.2, 1.7)
    found = compare(hidden, Head(matrix, bias, scale, cap), teacher, labels, which, 0.7, 0.4, rows)
    for value, exact in zip(found, (expected, ce, apart), strict=True):
        torch.testing.assert_close(value.detach(), exact.detach())
    for value, exact in zip(torch.autograd.grad(found[0], (hidden, matrix, bias)), gradients, strict=True):
        torch.testing.assert_close(value, exact)


def check_slopes(value, leaves, step=1e-6):
    """Some entries of the gradient of value() against central differences."""
    for leaf, found in zip(leaves, torch.autograd.grad(value(), leaves), strict=True):
        with torch.no_grad():
            for place in range(0, leaf.numel(), 7):
                old, ends = float(leaf.view(-1)[place]), []
                for moved in (old + step, old - step):
                    leaf.view(-1)[place] = moved
                    ends.append(float(value()))
                leaf.view(-1)[place] = old
                assert float(found.view(-1)[place]) == pytest.approx((ends[0] - ends[1]) / (2 * step), 1e-6, 1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind):
    (hidden, matrix, bias), teacher, labels = made()
    which = Divergence(kind, 0.3, 0.2, 1.7)

    head = Head(matrix, bias, 0.5, 3.0)
    check_slopes(lambda: compare(hidden, head, teacher, labels, which, 0.7, 0.4, 3)[0], (hidden, matrix, bias))


def test_a_graph_is_good_for_one_backward_pass():
    """Gradients are scaled where they lie; a second pass is refused, not wrong."""
    (hidden, matrix, _), teacher, _ = made()
    total, _, _ = compare(hidden, Head(matrix), teacher)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_ends_of_jsd_are_the_two_kl(beta):
    (hidden, matrix, _), teacher, _ = made()
    found = compare(hidden, Head(matrix), teacher, None, Divergence("jsd", beta))[0]
    other = Divergence("reverse-kl" if beta else "forward-kl")
    torch.testing.assert_close(found, compare(hidden, Head(matrix), teacher, None, other)[0])


def test_a_teacher_may_be_given_by_its_logits():
    (hidden, matrix, _), teacher, labels = made()
    given = logits_of(teacher)
    kept = given.clone()
    for which in (Divergence(), Divergence("jsd", temperature=2.0)):
        left, right = (
            compare(hidden, Head(matrix), t, labels, which, ce_weight=0.5, rows=2)[0] for t in (teacher, given)
        )
        torch.testing.assert_close(left, right)
    assert torch.equal(given, kept)


def test_sums_of_parts_are_the_sum_of_the_whole():
    """What accumulation rests on: any split of the tokens adds up, in values and gradients."""
    (hidden, matrix, bias), (there, head), labels = made()
    parts = [slice(0, 1), slice(1, 1), slice(1, 5), slice(5, 7)]
    results = []
    for chosen in ([slice(None)], parts):
        losses = [
            compare(hidden[p], Head(matrix, bias), (there[p], head), labels[p], Divergence("jsd"), 1.0, 0.3)
            for p in chosen
        ]
        total = sum(loss[0] for loss in losses)
        results.append([total.detach(), *torch.autograd.grad(total, (hidden, matrix, bias))])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


def test_no_tokens_give_zero():
    (hidden, matrix, bias), (there, head), labels = made()
    total, ce, apart = compare(hidden[:0], Head(matrix, bias), (there[:0], head), labels[:0], ce_weight=1.0)
    total.backward()
    assert float(total.detach()) == float(ce) == float(apart) == 0
    assert not matrix.grad.any()
    assert not bias.grad.any()


def test_several_measures_share_the_logits():
    (hidden, matrix, _), teacher, labels = made()
    terms = [(Divergence("forward-kl", temperature=2.0), 0.7), (Divergence("tvd"), 1.3)]
    total, sums = compare_all(hidden, Head(matrix), teacher, labels, terms, 0.5, 3)
    each = [compare(hidden, Head(matrix), teacher, None, which, weight) for which, weight in terms]
    ce, _, _ = compare(hidden, Head(matrix), None, labels, ce_weight=0.5)
    expected = each[0][0] + each[1][0] + ce
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(sums, torch.stack([2 * ce.detach(), each[0][2], each[1][2]]))
    left, right = (torch.autograd.grad(value, (hidden, matrix)) for value in (total, expected))
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other)


def test_padding_of_a_head_counts_for_the_labels_alone():
    """Two heads padded to different sizes: the measures see the tokens that both have, nothing of the rest."""
    (hidden, matrix, _), (there, head), labels = made()
    wider = Head(torch.cat([head.weight, normals()(3, WIDER)]))
    total, sums = compare_all(hidden, Head(matrix), (there, wider), labels, [(Divergence(), 1.0)], 0.5, 2, vocabulary=9)
    z = hidden @ matrix.T
    apart = divergence(z[:, :9], logits_of((there, head))[:, :9], Divergence())
    expected = apart + 0.5 * functional.cross_entropy(z, labels, reduction="sum")
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(sums[1], apart.detach())
    left, right = (torch.autograd.grad(value, (hidden, matrix)) for value in (total, expected))
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other)


class Low(nn.Module):
    """A linear layer with LoRA, in the form that peft gives it."""

    def __init__(self, base, rank, active=("one",)):
        super().__init__()
        self.base_layer = base
        rows, width = base.weight.shape
        normal, names = normals(), ("one", "two")
        self.lora_A = nn.ModuleDict({n: nn.Linear(width, rank, bias=False) for n in names}).double()
        self.lora_B = nn.ModuleDict({n: nn.Linear(rank, rows, bias=False) for n in names}).double()
        for name in names:
            self.lora_A[name].weight.data = normal(rank, width)
            self.lora_B[name].weight.data = normal(rows, rank)
        self.scaling = {"one": 0.5, "two": 2.0}
        self.lora_dropout = nn.ModuleDict({n: nn.Identity() for n in names})
        self.active_adapters, self.disable_adapters, self.merged = list(active), False, False

    def forward(self, x):
        found = self.base_layer(x)
        if self.disable_adapters:
            return found
        return found + sum(self.lora_B[n](self.lora_A[n](x)) * self.scaling[n] for n in self.active_adapters)


class Model:
    def __init__(self, layer, **values):
        self.layer, self.config = layer, type("Config", (), values)()

    def get_output_embeddings(self):
        return self.layer


@pytest.mark.parametrize("active", [("one",), ("one", "two")])
@pytest.mark.parametrize("frozen", [True, False])
def test_lora_on_the_head(active, frozen):
    (hidden, matrix, bias), teacher, labels = made()
    base = nn.Linear(WIDTH, TOKENS).double()
    base.weight.data, base.bias.data = matrix.detach().clone(), bias.detach().clone()
    layer = Low(base.requires_grad_(not frozen), 2, active)
    z = layer(hidden)
    expected = formula("jsd", z, logits_of(teacher)) + 0.4 * functional.cross_entropy(z, labels, reduction="sum")
    leaves = [hidden, *(p for p in layer.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(expected, leaves, allow_unused=True)
    head = head_of(Model(layer))
    torch.testing.assert_close(head.logits(hidden), z)
    found, _, _ = compare(hidden, head, teacher, labels, Divergence("jsd", 0.3, temperature=1.7), 1.0, 0.4, 3)
    torch.testing.assert_close(found, expected)
    for value, exact in zip(torch.autograd.grad(found, leaves, allow_unused=True), gradients, strict=True):
        if exact is None:
            assert value is None
        else:
            torch.testing.assert_close(value, exact)
    layer.disable_adapters = True
    torch.testing.assert_close(head_of(Model(layer)).logits(hidden), base(hidden))


def test_heads_are_read_with_their_scales_and_caps():
    layer = nn.Linear(WIDTH, TOKENS, bias=False)
    head = head_of(Model(layer, logit_scale=0.0625, final_logit_softcapping=30.0))
    assert (head.scale, head.cap) == (0.0625, 30.0)
    assert head_of(Model(layer, logits_scaling=8.0)).scale == 0.125


def test_a_tied_head_gathers_both_gradients():
    (_, matrix, _), teacher, labels = made()
    ids = labels.flip(0)

    def gradient(loss):
        return torch.autograd.grad(loss(functional.embedding(ids, matrix)), matrix)[0]

    found = gradient(lambda h: compare(h, Head(matrix), teacher, rows=2)[0])
    torch.testing.assert_close(found, gradient(lambda h: divergence(h @ matrix.T, logits_of(teacher), Divergence())))


# Top-k teachers


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_kept_is_exact(kind):
    (hidden, matrix, _), teacher, labels = made()
    which = Divergence(kind, 0.3, 0.2, 1.7)
    given = TopK.of(logits_of(teacher), TOKENS, 1.7)
    assert (given.rest == -torch.inf).all()
    results = []
    for told in (teacher, given):
        total, _, apart = compare(hidden, Head(matrix), told, labels, which, 0.7, 0.4, 3)
        results.append([total.detach(), apart, *torch.autograd.grad(total, (hidden, matrix))])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cross-entropy"])
def test_fewer_tokens_bound_the_divergence_from_below(kind):
    (hidden, matrix, _), teacher, _ = made()
    which, values = Divergence(kind, temperature=2.0), []
    for k in (1, 2, 5, 8):
        values.append(float(compare(hidden, Head(matrix), TopK.of(logits_of(teacher), k, 2.0), None, which)[2]))
    whole = float(compare(hidden, Head(matrix), teacher, None, which)[2])
    assert values == sorted(values)
    assert values[0] < values[-1] < whole


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_kept_tokens_by_finite_differences(kind):
    (hidden, matrix, _), teacher, _ = made()
    given = TopK.of(logits_of(teacher), 3, 1.7)
    which = Divergence(kind, 0.3, 0.2, 1.7)
    check_slopes(lambda: compare(hidden, Head(matrix), given, None, which, rows=2)[0], (hidden, matrix))


@pytest.mark.parametrize("kind", KINDS)
def test_places_that_are_filled_up_change_nothing(kind):
    (hidden, matrix, _), teacher, _ = made()
    which = Divergence(kind, 0.3, 0.2, 1.7)
    plain = TopK.of(logits_of(teacher), 3, 1.7)
    empty = torch.full_like(plain.log_probs[:, :2], -torch.inf)
    ids = torch.cat([plain.ids, plain.ids[:, :1], plain.ids[:, 2:]], 1)
    filled = TopK(torch.cat([plain.log_probs, empty], 1), ids, plain.rest)
    results = []
    for told in (plain, filled):
        total, _, _ = compare(hidden, Head(matrix), told, None, which)
        results.append([total.detach(), *torch.autograd.grad(total, (hidden, matrix))])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-13)  # sums of other widths


def test_a_student_that_knows_nothing_but_kept_tokens_stays_finite():
    student = torch.full((1, 5), -torch.inf)
    student[0, :2] = 0.0
    given = TopK.of(torch.tensor([[1.0, 0.0, -1.0, -2.0, -3.0]]), 2)
    for kind in KINDS:
        value, gradient = given.apart(student.clone(), Divergence(kind))
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()


# Sinkhorn


@pytest.mark.parametrize("block", [2, 3, 256])
@pytest.mark.parametrize("many", [4, 4096])
def test_sinkhorn_over_blocks_of_tokens(block, many):
    (hidden, matrix, bias), teacher, labels = made()
    measure = Sinkhorn(top_k=2, many=many, block=block)
    total, sums = compare_all(hidden, Head(matrix, bias), teacher, labels, [(Divergence(), 0.9), (measure, 0.3)], 0.1)
    z = hidden @ matrix.T + bias
    distance = measure.of(z, logits_of(teacher))
    if many == 4096:
        blocks = zip(z.split(block), logits_of(teacher).split(block), strict=True)
        torch.testing.assert_close(distance, sum(len(s) * sinkhorn_distance(s, t) for s, t in blocks))
    torch.testing.assert_close(sums[2], distance.detach())
    expected = 0.9 * divergence(z, logits_of(teacher), Divergence()) + 0.3 * distance
    expected = expected + 0.1 * functional.cross_entropy(z, labels, reduction="sum")
    torch.testing.assert_close(total, expected)
    left, right = (torch.autograd.grad(value, (hidden, matrix, bias)) for value in (total, expected))
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other)


# Formats and sizes


def test_frozen_heads_half_precision_and_cut_vocabularies():
    (hidden, matrix, _), teacher, labels = made(torch.bfloat16)
    frozen = Head(matrix.detach()).cut(9)
    total, _, _ = compare(hidden, frozen, (teacher[0], teacher[1].cut(9)), labels.clamp_max(8), ce_weight=1.0, rows=2)
    assert total.dtype == torch.float32
    total.backward()
    assert matrix.grad is None
    assert hidden.grad.dtype == torch.bfloat16
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_near_float64(kind, autocast):
    leaves, teacher, labels = made()
    low = torch.float32 if autocast else torch.bfloat16
    again = [leaf.detach().to(low).requires_grad_() for leaf in leaves]
    told = (teacher[0].to(low), Head(teacher[1].weight.to(low)))
    which = Divergence(kind, 0.3)
    results = []
    for (hidden, matrix, bias), given in ((leaves, teacher), (again, told)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and hidden is again[0]):
            total, _, _ = compare(hidden, Head(matrix, bias), given, labels, which, ce_weight=0.3, rows=3)
        total.backward()
        results.append([total.detach(), hidden.grad, matrix.grad, bias.grad])
    assert [value.dtype for value in results[1]] == [torch.float32, low, low, low]
    for exact, found in zip(*results, strict=True):
        assert (found.double() - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_masked_vocabulary_stays_finite(kind):
    z = torch.zeros(2, 4)
    z[:, 3] = -torch.inf
    student = z.clone().requires_grad_()
    loss = divergence(student, z, Divergence(kind))
    loss.backward()
    entropy = math.log(3) if kind == "cross-entropy" else 0.0
    assert float(loss.detach()) == pytest.approx(2 * entropy, abs=1e-6)
    assert torch.isfinite(student.grad).all()


def test_cut_heads_lose_their_padding_and_nothing_else():
    normal = normals()
    head = Head(normal(9, WIDTH), normal(9), 2.0, 5.0, [Adapter(normal(2, WIDTH), normal(9, 2), 0.5)])
    hidden = normal(3, WIDTH)
    torch.testing.assert_close(head.cut(6).logits(hidden), head.logits(hidden)[:, :6])
    assert head.cut(9) is head
    assert replace(head, cap=None).cut(3).cap is None


def test_no_tensor_holds_all_logits(monkeypatch):
    """The largest tensor that any operation of a step makes, forward and backward, is one chunk."""
    tokens, vocabulary, width = 32, 200, 8
    monkeypatch.setitem(_chunked._LOGITS, "cpu", 4 * vocabulary)
    normal = normals(torch.float32)
    hidden, matrix, bias = (normal(*s).requires_grad_() for s in ((tokens, width), (vocabulary, width), (vocabulary,)))
    teacher = (normal(tokens, width), Head(normal(vocabulary, width)))
    labels = torch.zeros(tokens, dtype=torch.int64)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for one in torch.utils._pytree.tree_leaves(out):
                if isinstance(one, torch.Tensor):
                    self.size = max(self.size, one.numel())
            return out

    for kind in ("forward-kl", "jsd"):
        with Largest() as seen:
            compare(hidden, Head(matrix, bias), teacher, labels, Divergence(kind), ce_weight=1.0)[0].backward()
        assert seen.size <= max(4 * vocabulary, vocabulary * width) < tokens * vocabulary / 3
