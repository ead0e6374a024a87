"""Sampling with caches: block form, loop over tokens, batches and prompts of unequal length agree."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdtool.generation import CachedModel, Interleaving, Warp, accepted, draw, generate, uniforms

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
