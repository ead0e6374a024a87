"""Decoders that write beside their encoders: block form, loop over tokens, batches and single rows agree."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from kdtool.errors import UsageProblem
from kdtool.generation import EncoderDecoder, Interleaving, Mixture, Source, Warp, accepted, draw, generate, uniforms
from kdtool.tasks._writing import opening

LENGTH = 10
SOURCES = [[4, 9, 3], [5, 7, 21, 9, 14, 3], [6, 3], [8, 8, 20, 11, 3]]
PAIRS = {"t5": ("t5-small", "t5"), "bart": ("bart-small", "bart")}
LIMITS = torch.tensor([LENGTH, 7, LENGTH, 10])


@pytest.fixture(scope="module")
def pairs(models):
    """Student and teacher of each family."""
    return {
        kind: [AutoModelForSeq2SeqLM.from_pretrained(models(name)).eval().requires_grad_(False) for name in names]
        for kind, names in PAIRS.items()
    }


def given(model, rows):
    """Source, and what the decoder begins with, of rows."""
    texts = [SOURCES[row] for row in rows]
    widest = max(map(len, texts))
    source = torch.tensor([text + [0] * (widest - len(text)) for text in texts])
    begin = torch.tensor([opening(model)] * len(rows))
    return Source(source, (source != 0).long()), begin, torch.ones_like(begin)


def logits(model, source, ids):
    """Of the next token, without a cache."""
    return model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([ids])).logits[:, -1]


def loop(student, teacher, source, uniform, settings, limit):
    """The algorithm of the paper, one token at a time."""
    ids = opening(student)
    begun = len(ids)
    for position in range(limit):
        token = draw(settings.student(logits(student, source, ids)), uniform[0, position : position + 1])
        raw = logits(teacher, source, ids)
        if not bool(accepted(raw, token, settings.k)):
            token = draw(settings.teacher(raw), uniform[1, position : position + 1])
        ids.append(int(token))
        if ids[-1] in settings.stop:
            break
    return ids[begun:]


def written(models, rows, settings):
    source, ids, mask = given(models[0], rows)
    scorers = [EncoderDecoder(model, source) for model in models]
    uniform = uniforms([(1, row) for row in rows], LENGTH)
    out = generate(scorers[0], scorers[1], ids, mask, uniform, settings, LIMITS[list(rows)])
    return {row: out.tokens[i][out.valid[i]].tolist() for i, row in enumerate(rows)}, out


@pytest.fixture(scope="module")
def looped(pairs):
    """Texts of all rows by the loop, made once for all sizes of blocks."""

    @cache
    def make(kind, settings):
        uniform = uniforms([(1, row) for row in range(4)], LENGTH)
        rows = zip(SOURCES, uniform, LIMITS.tolist(), strict=True)
        return [loop(*pairs[kind], source, own, settings, limit) for source, own, limit in rows]

    return make


@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("gamma", [1, 3, 40])
@pytest.mark.parametrize("kind", PAIRS)
def test_blocks_give_the_tokens_of_the_loop(pairs, looped, kind, gamma, k):
    settings = Interleaving(k, 1, Warp(1.2), Warp(0.9, 0.9), (3,))
    found, out = written(pairs[kind], range(4), replace(settings, gamma=gamma, in_step=kind == "bart"))
    assert list(found.values()) == looped(kind, settings)
    assert len({len(text) for text in found.values()}) > 1, "rows that end together show little"
    rejected = (out.valid & ~out.kept).sum(1)
    assert len(set(rejected.tolist())) > 1, "rows with as many replacements show little"


@pytest.mark.parametrize("kind", PAIRS)
def test_a_text_does_not_depend_on_the_rows_beside_it(pairs, kind):
    settings = Interleaving(8, 5, Warp(1.2), Warp(0.9), (3,), in_step=kind == "bart")
    together, _ = written(pairs[kind], range(4), settings)
    for rows in ([0], [3, 1], [2, 0, 3]):
        assert written(pairs[kind], rows, settings)[0] == {row: together[row] for row in rows}


@pytest.mark.parametrize("kind", PAIRS)
def test_greedy_texts_are_those_of_transformers(pairs, kind):
    model = pairs[kind][1]
    source, ids, mask = given(model, range(4))
    writer = EncoderDecoder(model, source)
    settings = Interleaving(student=Warp(0.0), stop=(3,))
    out = generate(writer, None, ids, mask, uniforms([(row,) for row in range(4)], LENGTH), settings)
    expected = model.generate(
        source.ids,
        attention_mask=source.mask,
        do_sample=False,
        max_new_tokens=LENGTH + ids.shape[1] - 1,
        forced_eos_token_id=None,
    )
    assert (expected[:, : ids.shape[1]] == ids).all(), "the start, and what is forced behind it"
    assert torch.equal(out.tokens, expected[:, ids.shape[1] :])


def test_an_encoder_reads_once_for_writing_and_learning(pairs, monkeypatch):
    calls = []
    for model in pairs["t5"]:
        encoder = model.get_encoder()
        plain = encoder.forward
        monkeypatch.setattr(encoder, "forward", lambda *a, _plain=plain, **k: (calls.append(1), _plain(*a, **k))[1])
    source, ids, mask = given(pairs["t5"][0], range(4))
    scorers = [EncoderDecoder(model, source) for model in pairs["t5"]]
    generate(*scorers, ids, mask, uniforms([(1, row) for row in range(4)], LENGTH), Interleaving(4, 3))
    assert len(calls) == 2
    assert source.states(pairs["t5"][1]).shape[0] == 4, "all rows, though some were done before others"
    assert len(calls) == 2
    pairs["t5"][0].requires_grad_(True)
    fresh = Source(source.ids, source.mask)
    found = [fresh.states(pairs["t5"][0]) for _ in range(2)]
    pairs["t5"][0].requires_grad_(False)
    assert all(states.requires_grad for states in found), "one that trains reads anew"
    torch.testing.assert_close(found[0].detach(), source.states(pairs["t5"][0]))


def test_a_mixture_of_encoder_decoders(pairs):
    source, ids, mask = given(pairs["bart"][0], range(4))
    parts = [EncoderDecoder(model, source) for model in pairs["bart"]]
    mixed = Mixture(*(EncoderDecoder(model, source) for model in pairs["bart"]), 0.3)
    found = []
    for scorer in (*parts, mixed):
        scorer.begin(ids, mask)
        found.append(scorer.feed(ids[:, -1:], mask.sum(1, keepdim=True) - 1).double().softmax(-1))
    torch.testing.assert_close(found[2], 0.7 * found[0] + 0.3 * found[1])


def test_vllm_is_refused_for_a_model_with_an_encoder(pairs):
    from kdtool.authors import LocalAuthor, ServedAuthor
    from kdtool.models import Loaded
    from kdtool.run import Run

    with pytest.raises(UsageProblem, match="does not serve encoder-decoders"):
        ServedAuthor(LocalAuthor(Loaded(pairs["t5"][0], None, "tiny"), Run()), None)
