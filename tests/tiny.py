"""Tiny random models and data sets as folders, for tests of everything above them.

Models have width 16 and random weights; the data can be learnt: the class decides the words, the
colour or the pitch. Everything is made from seeds, so two calls write the same bytes.
"""

import json
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kdtool.modeling import TabularConfig, TabularProcessor

LABELS = ["bad", "good", "so so"]
WIDTH = 16
SIDE = 8
"""Pixels of an image's side."""
RATE = 2000
"""Samples per second of the recordings."""
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = {"bad": ["awful", "dull", "slow"], "good": ["great", "warm", "bright"], "so so": ["plain", "usual", "fine"]}
FILLERS = ["a", "the", "this", "that", "film", "book", "meal", "was", "is", "very", "and", "we", "saw", "it", "here"]


def names_of(labels: Sequence[str] = LABELS) -> dict[str, dict]:
    """Class names as a model's configuration holds them."""
    return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}


def _vocabulary(reverse: bool) -> dict[str, int]:
    words = FILLERS + [word for words in WORDS.values() for word in words]
    return {word: i for i, word in enumerate(_SPECIAL + (words[::-1] if reverse else words))}


def save_bert_tokenizer(folder: Path, reverse: bool = False) -> None:
    """A word-level tokenizer with [CLS] A [SEP] B [SEP]; `reverse` gives the words other ids."""
    tokenizer = Tokenizer(models.WordLevel(_vocabulary(reverse), unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)


def save_marked_tokenizer(folder: Path, single: str = "$A [SEP]") -> None:
    """A word-level tokenizer for masked words, A [SEP] with a mask token, and for encoders with decoders."""
    vocabulary = {**_vocabulary(False), "[MASK]": len(_vocabulary(False))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=32,
    ).save_pretrained(folder)


def save_lm_tokenizer(folder: Path) -> None:
    """A word-level tokenizer with a beginning-of-sequence token and no padding token."""
    tokenizer = Tokenizer(models.WordLevel(_vocabulary(False), unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]"
    ).save_pretrained(folder)


def _save(config: transformers.PreTrainedConfig, auto: str, folder: Path, seed: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, auto).from_config(config)
        for name, parameter in model.named_parameters():
            # initial weights of 0.02 make all outputs alike; larger ones tell right from wrong
            if parameter.ndim > 1 and "norm" not in name.lower():
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def bert_config(layers: int = 4, labels: Sequence[str] = LABELS, dropout: float = 0.1) -> transformers.PreTrainedConfig:
    return transformers.BertConfig(
        vocab_size=len(_vocabulary(False)),
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **names_of(labels),
    )


def bert(folder: Path, layers: int = 4, labels: Sequence[str] = LABELS, seed: int = 1, **more: float) -> Path:
    """A sentence classifier with its tokenizer."""
    save_bert_tokenizer(folder)
    return _save(bert_config(layers, labels, **more), "AutoModelForSequenceClassification", folder, seed)


def _save_image_processor(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def vit(folder: Path, layers: int = 4, labels: Sequence[str] = LABELS, seed: int = 1) -> Path:
    """An image classifier made of attention."""
    _save_image_processor(folder)
    config = transformers.ViTConfig(
        image_size=SIDE,
        patch_size=4,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        hidden_dropout_prob=0.1,
        **names_of(labels),
    )
    return _save(config, "AutoModelForImageClassification", folder, seed)


def resnet(folder: Path, labels: Sequence[str] = LABELS, seed: int = 1) -> Path:
    """An image classifier made of convolutions, with batch norms."""
    _save_image_processor(folder)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **names_of(labels)
    )
    return _save(config, "AutoModelForImageClassification", folder, seed)


def wav2vec(folder: Path, layers: int = 2, labels: Sequence[str] = LABELS, seed: int = 1) -> Path:
    """An audio classifier on waveforms."""
    transformers.Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=RATE, padding_value=0.0, do_normalize=True, return_attention_mask=True
    ).save_pretrained(folder)
    config = transformers.Wav2Vec2Config(
        vocab_size=4,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        conv_dim=(8, 8),
        conv_kernel=(10, 8),
        conv_stride=(5, 4),
        num_feat_extract_layers=2,
        feat_extract_norm="layer",
        conv_bias=True,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=True,
        classifier_proj_size=8,
        mask_time_prob=0.0,
        layerdrop=0.0,
        **names_of(labels),
    )
    return _save(config, "AutoModelForAudioClassification", folder, seed)


def tabular(folder: Path, layers: int = 2, labels: Sequence[str] = LABELS, seed: int = 1) -> Path:
    """A classifier of rows, its processor fitted on the training rows of `table_data`."""
    processor = _fitted(table_rows(30, 7))
    processor.save_pretrained(folder)
    config = TabularConfig(
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        intermediate_size=WIDTH,
        embedding_size=4,
        **processor.sizes,
        **names_of(labels),
    )
    return _save(config, "AutoModel", folder, seed)


def _fitted(rows: Sequence[dict]) -> TabularProcessor:
    numbers = {name: np.array([row[name] for row in rows], dtype=float) for name in ("size", "weight")}
    return TabularProcessor.fit(numbers, {"kind": [row["kind"] for row in rows]})


def llama(folder: Path, layers: int = 4, seed: int = 1, padding: int = 0) -> Path:
    """A causal language model with rotary positions, its head padded by some rows."""
    save_lm_tokenizer(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(_vocabulary(False)) + padding,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=64,
        attention_dropout=0.1,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=None,
    )
    return _save(config, "AutoModelForCausalLM", folder, seed)


def t5(folder: Path, layers: int = 2, seed: int = 1) -> Path:
    """An encoder with a decoder."""
    save_marked_tokenizer(folder)
    config = transformers.T5Config(
        vocab_size=len(_vocabulary(False)) + 1,
        d_model=WIDTH,
        d_kv=WIDTH // 2,
        d_ff=2 * WIDTH,
        num_layers=layers,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=3,
    )
    return _save(config, "AutoModelForSeq2SeqLM", folder, seed)


def bart(folder: Path, layers: int = 2, seed: int = 1) -> Path:
    """The same with learnt positions, texts that begin with a forced token, and a constant added to logits."""
    save_marked_tokenizer(folder, "[CLS] $A [SEP]")
    config = transformers.BartConfig(
        vocab_size=len(_vocabulary(False)) + 1,
        d_model=WIDTH,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        max_position_embeddings=32,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        decoder_start_token_id=3,
    )
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(_save(config, "AutoModelForSeq2SeqLM", folder, seed))
    model.generation_config.forced_bos_token_id = 2
    model.final_logits_bias += torch.linspace(-1, 1, model.final_logits_bias.shape[1])
    model.save_pretrained(folder)
    return folder


def masked_bert(folder: Path, layers: int = 4, seed: int = 1) -> Path:
    """A masked language model."""
    save_marked_tokenizer(folder)
    config = bert_config(layers)
    config.vocab_size += 1
    return _save(config, "AutoModelForMaskedLM", folder, seed)


def byte_llama(folder: Path, layers: int = 2, seed: int = 3) -> Path:
    """The same with a byte-level tokenizer, whose tokens are parts of words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["text"] for row in text_rows(60, 5)], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    config = transformers.LlamaConfig(
        vocab_size=304,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    return _save(config, "AutoModelForCausalLM", folder, seed)


def sentence(kind: str, generator: np.random.Generator) -> str:
    """3 to 12 words, one of them telling the class."""
    words = list(generator.choice(FILLERS, generator.integers(2, 12)))
    words.insert(int(generator.integers(0, len(words) + 1)), str(generator.choice(WORDS[kind])))
    return " ".join(words)


def write_rows(path: Path, rows: Sequence[dict]) -> Path:
    """A .jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text_rows(size: int, seed: int, pairs: bool = False, names: bool = True) -> list[dict]:
    """Rows with `text`, `label` and, with pairs, `text_pair`; each class as often as the others."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(size):
        kind = LABELS[i % len(LABELS)]
        row = {"text": sentence(kind, generator), "label": kind if names else i % len(LABELS)}
        if pairs:
            row["text_pair"] = sentence(kind, generator)
        rows.append(row)
    return rows


def text_data(folder: Path, pairs: bool = False, train: int = 30, test: int = 12) -> Path:
    """train.jsonl and test.jsonl."""
    write_rows(folder / "train.jsonl", text_rows(train, 1, pairs))
    write_rows(folder / "test.jsonl", text_rows(test, 2, pairs))
    return folder


def image_data(folder: Path, each: int = 6) -> Path:
    """train|test/CLASS/*.png; the class decides the colour."""
    generator = np.random.default_rng(3)
    for split, count in (("train", each), ("test", 2)):
        for index, label in enumerate(LABELS):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 80, (10 + i, 12, 3), dtype=np.uint8)
                pixels[..., index] += 150
                Image.fromarray(pixels).save(folder / split / label / f"{i}.png")
    return folder


def audio_data(folder: Path, each: int = 5) -> Path:
    """train|test/CLASS/*.wav of several lengths; the class decides the pitch."""
    generator = np.random.default_rng(4)
    for split, count in (("train", each), ("test", 2)):
        for index, label in enumerate(LABELS):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                time = np.arange(RATE // 5 + 40 * i) / RATE
                sound = np.sin(2 * np.pi * 100 * (index + 1) * time) + generator.normal(0, 0.05, len(time))
                with wave.open(str(folder / split / label / f"{i}.wav"), "wb") as file:
                    file.setnchannels(1)
                    file.setsampwidth(2)
                    file.setframerate(RATE)
                    file.writeframes((sound * 10000).astype("<i2").tobytes())
    return folder


def table_rows(size: int, seed: int) -> list[dict]:
    """Rows with `size`, `weight` (sometimes missing), `kind` and `label`; the class decides all but the weight."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(size):
        index = i % len(LABELS)
        weight = None if i % 5 == 4 else float(generator.normal())
        kind = str(generator.choice(["oak", "elm", "ash"][index:]))
        rows.append({"size": index + float(generator.normal(0, 0.3)), "weight": weight, "kind": kind})
        rows[-1]["label"] = LABELS[index]
    return rows


def table_data(folder: Path, train: int = 30, test: int = 12) -> Path:
    """train.jsonl and test.jsonl with two columns of numbers, one of names and `label`."""
    write_rows(folder / "train.jsonl", table_rows(train, 7))
    write_rows(folder / "test.jsonl", table_rows(test, 8))
    return folder


def plain_text(folder: Path, train: int = 40, test: int = 15) -> Path:
    """train.jsonl and test.jsonl with `text` alone."""
    for name, size, seed in (("train", train, 5), ("test", test, 6)):
        write_rows(folder / f"{name}.jsonl", [{"text": row["text"]} for row in text_rows(size, seed)])
    return folder


def prompt_rows(size: int, seed: int) -> list[dict]:
    """Rows with `prompt` and `response` of several lengths; the telling word of the prompt decides the response."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(size):
        kind = LABELS[i % len(LABELS)]
        response = " ".join(["it was", *["very"] * int(generator.integers(0, 4)), WORDS[kind][0]])
        rows.append({"prompt": sentence(kind, generator), "response": response})
    return rows


def prompt_data(folder: Path, train: int = 30, test: int = 12) -> Path:
    """train.jsonl and test.jsonl with prompts and responses."""
    write_rows(folder / "train.jsonl", prompt_rows(train, 11))
    write_rows(folder / "test.jsonl", prompt_rows(test, 12))
    return folder
