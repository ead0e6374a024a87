"""Sampling with caches: block form, loop over tokens, batches and prompts of unequal length agree."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdtool.generation import (
    CachedModel,
    Interleaving,
    Mixture,
    StopStrings,
    Warp,
    accepted,
    draw,
    generate,
    uniforms,
)

V, LENGTH = 13, 12


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    made = []
    for width in (8, 16):
        config = LlamaConfig(
            vocab_size=V,
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.8,
            max_position_embeddings=64,
        )
        made.append(LlamaForCausalLM(config).eval().requires_grad_(False))
    return made


def loop(student, teacher, prompt, uniform, settings):
    """The algorithm of the paper, one token at a time and without a cache."""
    ids, out = list(prompt), []
    for position in range(uniform.shape[1]):
        row = torch.tensor([ids])
        token = draw(settings.student(student(row).logits[:, -1]), uniform[0, position : position + 1])
        raw = teacher(row).logits[:, -1]
        if not bool(accepted(raw, token, settings.k)):
            token = draw(settings.teacher(raw), uniform[1, position : position + 1])
        ids.append(int(token))
        out.append(int(token))
        if out[-1] in settings.stop:
            break
    return out


@pytest.mark.parametrize("k", [1, 4, V])
@pytest.mark.parametrize("gamma", [1, 3, 5, 40])
def test_blocks_give_the_tokens_of_the_loop(pair, k, gamma):
    settings = Interleaving(k, gamma, Warp(0.8), Warp(0.6, 0.9), (0,), pad=2, scored=True)
    prompts = [[1, 5], [1, 7, 3, 9], [4], [1, 2, 11]]
    uniform = uniforms([(0, row) for row in range(4)], LENGTH)
    widest = max(map(len, prompts))
    ids = torch.tensor([[0] * (widest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (widest - len(p)) + [1] * len(p) for p in prompts])
    out = generate(*map(CachedModel, pair), ids, mask, uniform, settings)
    for row, prompt in enumerate(prompts):
        assert out.tokens[row][out.valid[row]].tolist() == loop(*pair, prompt, uniform[row], settings)
        assert (out.tokens[row][~out.valid[row]] == 2).all()
    if k == V:
        assert out.kept[out.valid].all()
    assert (out.log_prob[out.valid] < 0).all()


def test_one_model_alone(pair):
    settings = Interleaving(student=Warp(0.0))
    ids = torch.tensor([[1, 5, 2]])
    out = generate(CachedModel(pair[0]), None, ids, torch.ones_like(ids), uniforms([(1,)], 6), settings)
    expected = pair[0].generate(ids, do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0)
    assert torch.equal(out.tokens, expected[:, 3:])


def test_draws_depend_on_their_key_alone():
    both = uniforms([(1, 2), (1, 3)], 5)
    assert torch.equal(both[1:], uniforms([(1, 3)], 5))
    assert torch.equal(both[0, :, :3][0], uniforms([(1, 2)], 5)[0, 0, :3])
    assert not torch.equal(both[0], both[1])


def test_draw_and_warp():
    p = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).double()
    for uniform, token in [(0.0, 0), (0.19, 0), (0.2, 2), (0.69, 2), (0.71, 3), (0.9999999999999999, 3)]:
        assert int(draw(p, torch.tensor([uniform]).double())) == token
    torch.testing.assert_close(Warp(1.0, 0.6)(p.log()), torch.tensor([[0, 0, 0.625, 0.375]]).double())
    assert Warp(0.0)(p.log()).tolist() == [[0, 0, 1, 0]]


def left_padded(prompts):
    widest = max(map(len, prompts))
    ids = torch.tensor([[0] * (widest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (widest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


PROMPTS = [[1, 5], [1, 7, 3, 9], [4], [1, 2, 11], [6, 6]]
LIMITS = [LENGTH, 3, 7, LENGTH, 0]


def written(pair, rows, settings, limits=LIMITS):
    """What each row's text is when these rows are written together."""
    ids, mask = left_padded([PROMPTS[row] for row in rows])
    most = torch.tensor([limits[row] for row in rows])
    uniform = uniforms([(5, row) for row in rows], int(most.max()))
    models = [CachedModel(model, V) for model in pair]
    out = generate(models[0], models[1] if len(models) > 1 else None, ids, mask, uniform, settings, most)
    return {row: out.tokens[i][out.valid[i]].tolist() for i, row in enumerate(rows)}


@pytest.mark.parametrize("expected_length", [0, 6])
@pytest.mark.parametrize("alone", [False, True])
def test_a_text_does_not_depend_on_the_rows_beside_it(pair, alone, expected_length):
    settings = Interleaving(4, 3, Warp(0.8), Warp(0.6, 0.9), (0,), expected_length=expected_length)
    models = pair[:1] if alone else pair
    together = written(models, [0, 1, 2, 3, 4], settings)
    assert [len(together[row]) <= limit for row, limit in enumerate(LIMITS)] == [True] * 5
    assert len({len(text) for text in together.values()}) > 2
    for rows in ([0], [1], [2], [3], [3, 1], [2, 0, 4]):
        for row, text in written(models, rows, settings).items():
            assert text == together[row], (row, rows)


def test_rank_falls_with_the_blocks():
    assert [Interleaving(k=25, expected_length=100).rank(n) for n in range(7)] == [25, 24, 24, 24, 24, 23, 23]
    assert [Interleaving(k=10, expected_length=4).rank(n) for n in range(6)] == [10, 7, 4, 1, 1, 1]
    assert Interleaving(k=10).rank(99) == 10


class Words:
    """Decodes an id to a letter."""

    def decode(self, ids, **_):
        return "".join("abcdefghijklm"[i] for i in ids)


@pytest.mark.parametrize("gamma", [1, 4, 9])
def test_stop_strings_end_a_text_with_the_token_that_completes_them(pair, gamma):
    plain = Interleaving(V, gamma, Warp(1.0), pad=2)
    free = written(pair, [0, 1, 2, 3], plain)
    texts = {row: Words().decode(ids) for row, ids in free.items()}
    strings = [texts[0][3:5], texts[3][6:8]]
    settings = Interleaving(V, gamma, Warp(1.0), stop_strings=StopStrings(Words(), strings), pad=2)
    for row, ids in written(pair, [0, 1, 2, 3], settings).items():
        ends = [texts[row].find(string) + len(string) for string in strings if string in texts[row]]
        assert ids == free[row][: min(ends, default=None)]


class Never(Warp):
    """A teacher that must not be asked for a token."""

    def draw(self, logits, uniform):
        raise AssertionError("the teacher was asked")


def test_the_whole_vocabulary_never_calls_a_teacher_draw(pair):
    written(pair, [0, 1, 2, 3], Interleaving(V, 3, Warp(1.0), Never()))
    with pytest.raises(AssertionError, match="the teacher was asked"):
        written(pair, [0, 1, 2, 3], Interleaving(V - 6, 3, Warp(1.0), Never()))


def test_k_of_one_emits_the_teachers_best_or_its_samples(pair):
    settings = Interleaving(1, 3, Warp(1.0), Warp(1.0))
    ids, mask = left_padded(PROMPTS)
    uniform = uniforms([(5, row) for row in range(5)], LENGTH)
    out = generate(*map(CachedModel, pair), ids, mask, uniform, settings)
    whole = torch.cat([ids, out.tokens], 1)
    seen = set()
    for row, prompt in enumerate(PROMPTS):
        for at in range(LENGTH):
            before = whole[row : row + 1, ids.shape[1] - len(prompt) : ids.shape[1] + at]
            logits = pair[1](before).logits[:, -1]
            own = draw(settings.teacher(logits), uniform[row, 1, at : at + 1])
            kept = bool(out.kept[row, at])
            assert int(out.tokens[row, at]) == int(logits.argmax() if kept else own)
            seen.add(kept)
    assert seen == {True, False}


def test_a_mixture_is_of_probabilities(pair):
    ids, mask = left_padded(PROMPTS)
    parts = [CachedModel(model) for model in pair]
    mixed = Mixture(*map(CachedModel, pair), 0.2)
    found = []
    for scorer in (*parts, mixed):
        scorer.begin(ids, mask)
        found.append(scorer.feed(ids[:, -1:], mask.sum(1, keepdim=True) - 1).double().softmax(-1))
    torch.testing.assert_close(found[2], 0.8 * found[0] + 0.2 * found[1])
    uniform = uniforms([(5, row) for row in range(5)], LENGTH)
    out = generate(mixed, None, ids, mask, uniform, Interleaving(scored=True))
    first = (0.8 * found[0] + 0.2 * found[1])[:, 0].gather(1, out.tokens[:, :1])[:, 0]
    torch.testing.assert_close(out.log_prob[:, 0], first.log())


def test_a_nucleus_keeps_ties_of_smaller_ids():
    p = torch.tensor([[0.2, 0.1, 0.1, 0.3, 0.1, 0.2]]).double()
    assert Warp(1.0, 0.55)(p.log())[0].gt(0).tolist() == [True, False, False, True, False, True]
    assert Warp(1.0, 0.75)(p.log())[0].gt(0).tolist() == [True, True, False, True, False, True]
    flat = torch.zeros(2, 5000)  # more tokens than a nucleus is first looked for in
    assert Warp(1.0, 0.4999)(flat).gt(0).sum(1).tolist() == [2500, 2500]
    assert Warp(1.0, 0.4999)(flat)[0, :2500].gt(0).all()


class Tables:
    """Next-token logits [length, V, V] that depend on position and last token."""

    def __init__(self, table):
        self.table = table

    def begin(self, ids, mask):
        pass

    def feed(self, tokens, positions):
        return self.table[positions, tokens]

    def keep(self, counts, fed):
        pass

    def select(self, rows):
        pass


def test_smaller_k_accepts_less_and_pleases_the_teacher_more():
    generator = torch.Generator().manual_seed(3)
    teacher = 1.8 * torch.randn(20, 16, 16, generator=generator).double()
    student = 0.6 * teacher + 1.3 * torch.randn(20, 16, 16, generator=generator).double()
    ids = torch.ones(400, 1, dtype=torch.long)
    uniform = uniforms([(9, row) for row in range(400)], 20)
    likely, accepted_share = [], []
    for k in (16, 8, 5, 3, 1):
        settings = Interleaving(k, 5, scored=True)
        out = generate(Tables(student), Tables(teacher), ids, torch.ones_like(ids), uniform, settings)
        likely.append(float(out.log_prob.mean()))
        accepted_share.append(float(out.kept.double().mean()))
    alone = generate(Tables(teacher), None, ids, torch.ones_like(ids), uniform, Interleaving(scored=True))
    assert accepted_share[0] == 1
    assert accepted_share == sorted(accepted_share, reverse=True)
    assert likely == sorted(likely)
    # small k takes the teacher's modes where the student proposes them: its texts are likelier than samples
    assert likely[0] < float(alone.log_prob.mean()) < likely[-1]
