"""Patching many families of models: masks are kept, nothing is dropped, what is not patched stays as it was."""

import pytest
import torch
from torch import nn

from kdtool import patching
from kdtool.errors import ModelProblem, UsageProblem
from kdtool.patching import interface
from tests.patching.families import EXACT, FAMILIES, N, build, ids, noise, output, text

SETTINGS = {"leaf": 4, "near": 2, "block": 16, "chunk": 16}
each = pytest.mark.parametrize("name", FAMILIES)


def made(name):
    make, inputs = FAMILIES[name]
    model = build(make)
    return model, inputs(), patching.find_sites(model, lambda: output(model, inputs()))


def patched(name, method="cluster", chosen=None, **settings):
    model, inputs, sites = made(name)
    settings = settings or (SETTINGS if method == "cluster" else {})
    layers = [
        patching.Layer(site.name, method, settings)
        for site in sites
        if site.reason is None and (chosen is None or site.number in chosen)
    ]
    patching.patch(model, layers, method)
    return model, inputs


@each
def test_every_layer_is_found_and_called(name):
    model, inputs, sites = made(name)
    assert [site.reason for site in sites] == [None] * len(sites)
    patching.patch(model, [patching.Layer(site.name, "cluster", SETTINGS) for site in sites], "cluster")
    count = patching.check_called(model, lambda: output(model, inputs))
    assert count.approximate == count.total == len(sites) > 0


@each
def test_without_a_patched_layer_nothing_changes(name):
    model, inputs = patched(name, chosen=())
    assert output(model, inputs).equal(output(build(FAMILIES[name][0]), inputs))


@each
def test_patched_comes_near_exact_and_layers_before_are_bit_for_bit(name):
    exact = build(FAMILIES[name][0])
    model, inputs = patched(name, chosen=(1,))
    seen: dict[str, list] = {"exact": [], "patched": []}
    patching.find_sites(exact, lambda: output(exact, inputs))
    patching.install(exact, [])
    for kind, one in (("exact", exact), ("patched", model)):
        with interface.watching(lambda call, kind=kind: seen[kind].append(call)):
            result = output(one, inputs)
        seen[kind].append(result)
    assert seen["exact"][0].q.equal(seen["patched"][0].q)
    assert seen["exact"][1].q.equal(seen["patched"][1].q)
    difference = (seen["exact"][-1] - seen["patched"][-1]).abs().max()
    assert difference < 0.5
    assert difference > 0 or seen["patched"][1].call.window  # windows are exact, only faster


@pytest.mark.parametrize(
    "name", ["bert", "distilbert", "clip-text", "modernbert", "llama", "mistral", "gemma3", "gpt2"]
)
@pytest.mark.parametrize("method", ["exact", "cluster"])
def test_padding_is_never_dropped(name, method):
    model, inputs = patched(name, method)
    mask = inputs["attention_mask"].bool()
    other = {**inputs, "input_ids": torch.where(mask, inputs["input_ids"], 33)}
    before, after = output(model, inputs), output(model, other)
    if before.dim() == 3:  # what padding itself becomes is nobody's concern
        before, after = before[mask], after[mask]
    assert before.equal(after)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_padded_equals_unpadded(name):
    model, _ = patched(name, "exact")
    short = ids(1, 70)
    mask = torch.zeros(1, N, dtype=torch.long)
    mask[:, :70] = 1
    padded = {"input_ids": nn.functional.pad(short, (0, N - 70)), "attention_mask": mask}
    one, other = output(model, {"input_ids": short}), output(model, padded)
    torch.testing.assert_close(one, other[:, :70] if one.dim() == 3 else other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3", "clip-text"])
def test_the_future_stays_hidden(name):
    model, _ = patched(name)
    before, after = ids(1), ids(1)
    after[:, 60:] = ids(1, 20, seed=7)
    one, other = output(model, {"input_ids": before}), output(model, {"input_ids": after})
    assert one[:, :60].equal(other[:, :60])
    assert not one[:, 60:].equal(other[:, 60:])


@pytest.mark.parametrize("name", EXACT)
def test_full_biases_stay_exact_with_a_reason(name):
    make, inputs, word = EXACT[name]
    model = build(make)
    before = output(model, inputs())
    sites = patching.find_sites(model, lambda: output(model, inputs()))
    assert sites
    assert all(word in (site.reason or "") for site in sites)
    layers = [patching.Layer(site.name, "exact", reason=site.reason) for site in sites]
    patching.patch(model, layers, "cluster")
    assert output(model, inputs()).equal(before)


def test_a_layer_that_does_not_call_is_found_out():
    model = build(EXACT["mpnet"][0])
    name = "encoder.layer.0.attention.attn"
    patching.install(model, [patching.Layer(name, "cluster", SETTINGS)])
    with pytest.raises(ModelProblem, match="never asked"):
        patching.check_called(model, lambda: output(model, text()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_is_exact_where_everything_is(name):
    prompt = text("left")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = build(FAMILIES[name][0]).generate(**prompt, **options)
    model, _ = patched(name, "exact")
    assert model.generate(**prompt, **options).equal(wanted)


def test_prefill_is_approximate_and_decoding_exact():
    model, _ = patched("llama")
    with patching.counting() as count:
        model.generate(**text("left"), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert count.approximate == 2
    assert count.total == 8


def test_short_inputs_are_exact():
    model, inputs, sites = made("bert")
    before = output(model, inputs)
    patching.patch(model, [patching.Layer(site.name, "cluster", SETTINGS, N + 1) for site in sites], "cluster")
    assert output(model, inputs).equal(before)


def test_attention_weights_are_refused():
    model, inputs = patched("bert")
    with pytest.raises(ModelProblem, match="attention weights"):
        model(**inputs, output_attentions=True)


def test_packed_sequences_stay_apart():
    model, _ = patched("llama")
    places = torch.cat([torch.arange(40), torch.arange(40)])[None]
    with patching.counting() as count:
        output(model, {"input_ids": ids(1), "position_ids": places, "use_cache": False})
    assert count.approximate == 0
    assert count.total == 2


def test_training_passes_gradients():
    model, inputs = patched("bert")
    model.train()
    model(**inputs).logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "query" in name or "key.weight" in name)


NAMED = {None: [0, 1, 2, 3], "0-2": [0, 1, 2], "3,1": [1, 3], "all": [0, 1, 2, 3]}


@pytest.mark.parametrize(("given", "numbers"), NAMED.items())
def test_layers_are_named_by_number(given, numbers):
    assert patching.parse_layers(given, 4) == numbers


@pytest.mark.parametrize("wrong", ["4", "2-1", "a", "", "1,,2", "-1"])
def test_wrong_layers_are_refused(wrong):
    with pytest.raises(UsageProblem, match="--layers"):
        patching.parse_layers(wrong, 4)


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Timm(Fused):
    """All that timm's attention may have: norms of queries, keys and outputs, a scale, dropout of the projection."""

    def __init__(self):
        super().__init__()
        self.q_norm, self.k_norm, self.norm = nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm(8)
        self.scale, self.proj_drop = 0.3, nn.Dropout(0.5)

    def forward(self, x, attn_mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask, scale=self.scale)
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))


class Own(nn.Module):
    def __init__(self, kind=Fused):
        super().__init__()
        self.blocks = nn.ModuleList([kind(), kind()])

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("kind", [Fused, Timm])
def test_modules_of_another_make_are_named_by_a_pattern(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Own(kind).eval()
    x = noise(1, N, 8)

    def run():
        with torch.no_grad():
            return model(x)

    before = run()
    sites = patching.find_sites(model, run, "blocks.*")
    assert [site.name for site in sites] == ["blocks.0", "blocks.1"]
    patching.install(model, [patching.Layer("blocks.1", "cluster", SETTINGS)], "blocks.*")
    assert patching.check_called(model, run).approximate == 1
    assert 0 < (run() - before).abs().max() < 1
    with pytest.raises(ModelProblem, match="names no module"):
        patching.find_sites(Own(), run, "layers.*")
