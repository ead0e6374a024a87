"""What single compressors promise beyond the contract, on tiny models."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from tokenizers.trainers import BpeTrainer

from kdtool.compressors import _tokenizer, low_rank, quantize, vocab, width
from kdtool.compressors._base import Context, divergence, loss_over
from kdtool.data.examples import Examples
from kdtool.derive import from_layers
from kdtool.errors import ModelProblem, UsageProblem
from kdtool.modeling.quantized import QuantizedLinear, dequantize, pack, unpack
from kdtool.modeling.quantized import quantize as rounded
from kdtool.models import Loaded, load
from kdtool.registry import COMPRESSORS, TASKS
from kdtool.run import Run
from kdtool.saving import save_model
from kdtool.sections import OutputSection
from kdtool.verify import outputs
from tests.contract.test_compressors import apply, context_of
from tests.kits import make_kit

RUN = Run(offline=True)


@pytest.fixture(scope="module")
def kits(models, data):
    return {task: make_kit(task, models, data) for task in ("text-classification", "causal-lm")}


@pytest.mark.parametrize(("pattern", "group"), [("unstructured", 16), ("2:4", 4)])
def test_sparse_keeps_half_of_each_group(kits, pattern, group):
    made = apply("sparse", kits["text-classification"], True, pattern=pattern)
    weight = made.model.bert.encoder.layer[1].attention.self.query.weight
    assert ((weight != 0).reshape(-1, group).sum(1) == group // 2).all()
    assert made.facts["zeros"] * 2 == made.facts["weights"]


def test_low_rank_on_data_loses_less_of_the_outputs_than_without(kits):
    kit = kits["text-classification"]
    probe = kit.task.example_inputs(kit.train, 4)
    expected = outputs(kit.task, kit.teacher.model, probe)
    errors = [(outputs(kit.task, apply("low-rank", kit, c).model, probe) - expected).norm() for c in (True, False)]
    assert errors[0] < errors[1]


def test_width_keeps_the_neurons_that_the_data_excites(kits):
    kit = kits["causal-lm"]
    loaded = kit.copy(kit.teacher)
    mlp = loaded.model.model.layers[0].mlp
    with torch.no_grad():
        mlp.up_proj.weight[::2] = 0.0  # every other neuron is silent
    config = COMPRESSORS.build_config("width", {})
    context = Context(kit.task, [kit.task.example_inputs(kit.train, 4)], RUN)
    made = COMPRESSORS.get("width")(loaded, config, context)
    assert torch.equal(made.model.model.layers[0].mlp.up_proj.weight, mlp.up_proj.weight[1::2])


def test_grouped_heads_go_by_groups():
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).eval()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.o_proj.weight[:, :8] = 0.0  # the first group says nothing
    context = Context(TASKS.get("causal-lm")(), None, RUN)
    made = width.compress(Loaded(model, None, "x"), width.Config(ffn=1.0, heads=0.5), context)
    ids = torch.arange(6).unsqueeze(0)
    torch.testing.assert_close(made.model(ids).logits, model(ids).logits)
    assert (made.model.config.num_attention_heads, made.model.config.num_key_value_heads) == (2, 1)


@pytest.mark.parametrize("shares", [{"heads": 0.5, "ffn": 1.0}, {"hidden": 0.5, "ffn": 1.0}])
def test_shapes_that_bert_cannot_state_reload_and_plain_transformers_refuses(kits, shares, tmp_path):
    kit = kits["text-classification"]
    made = apply("width", kit, True, **shares)
    query = made.model.whole.bert.encoder.layer[0].attention.self.query
    assert query.weight.shape == ((8, 16) if "heads" in shares else (16, 8))
    save_model(made, tmp_path, OutputSection())
    probe = kit.task.example_inputs(kit.test, 3)
    assert torch.equal(outputs(kit.task, load(tmp_path), probe), outputs(kit.task, made.model, probe))
    assert "auto_map" not in (tmp_path / "config.json").read_text()
    if "hidden" in shares:
        return  # one process is enough
    code = "import transformers as t; t.AutoModelForSequenceClassification.from_pretrained('.')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "kdtool-compressed" in done.stderr.strip().rsplit("ValueError", 1)[-1]


def test_equal_shares_of_heads_and_channels_are_a_plain_model(kits):
    made = apply("width", kits["text-classification"], True, ffn=1.0, heads=0.5, hidden=0.5)
    config = made.model.config
    assert (type(made.model).__name__, config.hidden_size, config.num_attention_heads) == (
        "BertForSequenceClassification", 8, 1,
    )  # fmt: skip


def test_silent_channels_and_heads_cost_nothing(kits):
    kit = kits["causal-lm"]
    loaded = kit.copy(kit.teacher)
    model = loaded.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("o_proj.weight"):
                parameter[:, :8] = 0.0  # the first head says nothing
    probe = kit.task.example_inputs(kit.test, 3)
    made = width.compress(loaded, width.Config(ffn=1.0, heads=0.5), context_of(kit, True))
    torch.testing.assert_close(outputs(kit.task, made.model, probe), outputs(kit.task, model, probe))


def test_fused_queries_go_with_the_channels():
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=1
    )
    loaded = Loaded(transformers.GPT2LMHeadModel(config).eval(), None, "gpt2")
    context = Context(TASKS.get("causal-lm")(), None, RUN)
    made = width.compress(loaded, width.Config(ffn=0.5, heads=0.5, hidden=0.5), context)
    assert made.model.transformer.h[0].attn.c_attn.weight.shape == (16, 48)
    with pytest.raises(ModelProblem, match="go together"):
        width.compress(loaded, width.Config(heads=0.5), context)


def test_the_layer_whose_loss_is_least_goes(kits):
    kit = kits["causal-lm"]
    context = context_of(kit, True)
    config = COMPRESSORS.build_config("layers", {"choose": "loss", "keep": 0.75})
    chosen = COMPRESSORS.get("layers")(kit.teacher, config, context).facts["layers"]
    losses = {
        cut: loss_over(from_layers(kit.teacher, f"layers:{','.join(map(str, cut))},").model, context)
        for cut in itertools.combinations(range(4), 3)
    }
    assert tuple(chosen) == min(losses, key=losses.get)


def test_layers_that_do_nothing_go_first(kits):
    kit = kits["causal-lm"]
    loaded = kit.copy(kit.teacher)
    with torch.no_grad():
        for i in (0, 2):
            loaded.model.model.layers[i].mlp.down_proj.weight.zero_()
            loaded.model.model.layers[i].self_attn.o_proj.weight.zero_()
    config = COMPRESSORS.build_config("layers", {"choose": "change"})
    assert COMPRESSORS.get("layers")(loaded, config, context_of(kit, True)).facts["layers"] == [1, 3]


def test_a_global_budget_gives_ranks_to_matrices_that_need_them(kits):
    kit = kits["text-classification"]
    loaded = kit.copy(kit.teacher)
    simple = [layer.intermediate.dense.weight for layer in loaded.model.bert.encoder.layer]
    with torch.no_grad():
        for weight in simple:
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            weight.copy_((u[:, :3] * s[:3]) @ v[:3])
    spectra = low_rank._spectra(loaded, context_of(kit, False))
    errors, costs = [], []
    for ranks in ("global", "uniform"):
        found = low_rank._ranks(spectra, low_rank.Config(keep=0.7, ranks=ranks))
        kept = {name: found.get(name, len(s.values)) for name, s in spectra.items()}
        errors.append(
            sum(float(s.values[kept[n] :].square().sum() / s.values.square().sum()) for n, s in spectra.items())
        )
        costs.append(sum(min(kept[n] * s.each, s.whole) for n, s in spectra.items()))
        if ranks == "global":
            assert all(rank <= 3 for name, rank in kept.items() if "intermediate" in name)
    assert errors[0] < errors[1]
    assert costs[0] <= 0.7 * sum(s.whole for s in spectra.values())


@pytest.mark.parametrize("columns", [6, 7])
def test_four_bits_are_packed_two_in_a_byte(columns):
    codes = torch.randint(-8, 8, (5, columns), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    assert pack(codes).shape == (5, (columns + 1) // 2)
    assert torch.equal(unpack(pack(codes), columns), codes)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 4), (4, None)])
def test_rounding_errs_by_at_most_half_a_step(bits, group):
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    codes, scale = rounded(weight, bits, group)
    found = dequantize(codes, scale, 8)
    step = scale.repeat_interleave(8 // scale.shape[1], dim=1)
    clipped = found.abs() >= (2 ** (bits - 1) - 1) * step * 0.999
    assert ((found - weight).abs()[~clipped] <= 0.5001 * step[~clipped]).all()
    largest = (weight.reshape(6, scale.shape[1], -1).abs().amax(-1) / (2 ** (bits - 1) - 1))[..., None]
    parts = weight.reshape(6, scale.shape[1], -1)
    naive = (parts / largest).round() * largest
    assert (found - weight).norm() <= (naive - parts).norm() * (1 + 1e-6)


def test_dynamic_products_are_close_to_those_of_floats():
    generator = torch.Generator().manual_seed(2)
    linear = torch.nn.Linear(64, 32)
    module = QuantizedLinear.replacing(linear, {"bits": 8, "dynamic": True}, linear)
    codes, scale = rounded(linear.weight.detach(), 8)
    module.load_state_dict({"codes": codes, "scale": scale, "bias": linear.bias.detach()})
    x = torch.randn(5, 3, 64, generator=generator)
    expected = linear(x)
    assert (module(x) - expected).norm() < 0.03 * expected.norm()
    with_floats = module.double()(x.double())
    assert (with_floats - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(("scheme", "bytes_left"), [("int8", 0.45), ("int4", 0.4), ("int8-dynamic", 0.45)])
def test_quantised_files_are_smaller(kits, scheme, bytes_left, tmp_path):
    kit = kits["causal-lm"]
    made = apply("quantize", kit, False, scheme=scheme)
    for name, loaded in (("before", kit.copy(kit.teacher)), ("after", made)):
        save_model(loaded, tmp_path / name, OutputSection())
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    sizes = [sum(t.numel() * t.element_size() for t in tensors.values()) for tensors in (before, after)]
    assert sizes[1] < bytes_left * sizes[0]
    assert made.parameters == kit.teacher.parameters


def test_a_quantised_table_is_shared_with_the_head():
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    task = TASKS.get("causal-lm")()
    made = quantize.compress(Loaded(model, None, "x"), quantize.Config(), Context(task, None, RUN))
    assert not any("lm_head" in name for name in made.model.state_dict())
    batch = {"input_ids": torch.arange(12).reshape(2, 6)}
    assert divergence([outputs(task, model, batch)], [outputs(task, made.model, batch)]) < 1e-3


def test_quantising_twice_is_refused(kits):
    kit = kits["text-classification"]
    made = apply("quantize", kit, False)
    with pytest.raises(ModelProblem, match="quantised already"):
        quantize.compress(made, quantize.Config(), context_of(kit, False))


def test_what_was_factored_can_be_quantised(kits, tmp_path):
    kit = kits["text-classification"]
    made = quantize.compress(apply("low-rank", kit, True), quantize.Config(scheme="int4"), context_of(kit, False))
    save_model(made, tmp_path, OutputSection())
    probe = kit.task.example_inputs(kit.test, 3)
    assert torch.equal(outputs(kit.task, load(tmp_path), probe), outputs(kit.task, made.model, probe))
    assert type(made.model.whole.bert.encoder.layer[0].attention.self.query.inner) is QuantizedLinear


TEXTS = ["low lower lowest", "new newer newest", "wide wider widest", "the newest low tide"]


def _tokenizer_of(kind):
    """A tokenizer learnt from a few words, with more tokens than the data below uses."""
    if kind == "WordPiece":
        letters = sorted(set("".join(TEXTS).replace(" ", "")))
        words = ["low", "##er", "##est", "new", "wide", "##r", "##st", "the", "tide", "##ide", "lo", "##w"]
        names = ["[UNK]", "[CLS]", *letters, *(f"##{c}" for c in letters), *words]
        vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
        tokenizer = Tokenizer(token_models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return tokenizer
    if kind == "Unigram":
        letters = sorted(set("".join(TEXTS)))
        pieces = [("<unk>", 0.0), *((c, -6.0) for c in letters)]
        words = ["low", "er", "est", "new", "wide", "newest", "tide", "the", "lower", "lowland"]
        pieces += [(word, -3.0 - i / 7) for i, word in enumerate(words)]
        tokenizer = Tokenizer(token_models.Unigram(pieces, unk_id=0, byte_fallback=False))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return tokenizer
    tokenizer = Tokenizer(token_models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=330,
        special_tokens=["<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS, "words that nobody uses afterwards, or hardly ever"] * 3, trainer)
    return tokenizer


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])
@pytest.mark.parametrize("values", [{}, {"min_count": 2}, {"keep": 0.5}])
def test_texts_whose_tokens_stay_are_cut_and_scored_as_before(kind, values, tmp_path):
    processor = transformers.PreTrainedTokenizerFast(tokenizer_object=_tokenizer_of(kind), unk_token=None)
    processor.add_special_tokens({"eos_token": "<end>"})
    config = transformers.LlamaConfig(
        vocab_size=len(processor), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=processor.eos_token_id, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    rows = Examples({"input_ids": processor(TEXTS)["input_ids"]})
    task = TASKS.get("causal-lm")()
    loaded = Loaded(model, processor, "x")
    made = vocab.compress(loaded, vocab.Config(**values), Context(task, None, RUN, rows))
    save_model(made, tmp_path, OutputSection())
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == made.model.config.vocab_size < len(processor)
    assert again.eos_token_id == made.model.config.eos_token_id
    kept = made.facts["kept"]
    alike = 0
    for before, after in zip(rows.columns["input_ids"], again(TEXTS)["input_ids"], strict=True):
        assert "".join(again.convert_ids_to_tokens(after)).replace("##", "")  # any text still encodes
        if set(before) <= set(kept.tolist()):
            alike += 1
            assert [kept.tolist()[i] for i in after] == before
            old = outputs(task, model, {"input_ids": torch.tensor([before])})
            new = outputs(task, load(tmp_path), {"input_ids": torch.tensor([after])})
            torch.testing.assert_close(new, old[:, kept])
    assert alike == len(TEXTS) or values


def test_byte_pairs_keep_the_parts_of_their_tokens():
    spec = json.loads(_tokenizer_of("BPE").to_str())
    names = {number: token for token, number in _tokenizer.tokens_of(spec).items()}
    longest = max(names, key=lambda number: len(names[number]))
    parts = {names[number] for number in _tokenizer.parts_of(spec)(longest)}
    made = {a + b for a, b in map(tuple, spec["model"]["merges"])}
    assert len(parts) == len(names[longest]) - 1 or parts <= made
    assert all(
        any(a + b == part for a, b in itertools.product(parts | set(names[longest]), repeat=2)) for part in parts
    )


def test_a_vocabulary_without_room_for_characters_is_refused(kits):
    with pytest.raises(UsageProblem, match="no room"):
        apply("vocab", kits["text-classification"], True, size=2)
