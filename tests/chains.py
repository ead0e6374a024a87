"""Tiny models that spell, and questions with rationales, for tests of what writes and learns chains of thought."""

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.tiny import write_rows

SPECIAL = ["<pad>", "<s>", "</s>"]


def save_byte_tokenizer(folder: Path, reverse: bool = False) -> int:
    """A token for each byte; `reverse` numbers them otherwise. Gives their number."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return len(vocabulary)


def speller(folder: Path, layers: int = 1, seed: int = 1, reverse: bool = False, letters: str = "") -> Path:
    """A causal language model over bytes, of random weights; `letters` are those it writes most."""
    size = save_byte_tokenizer(folder, reverse)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=size,
                hidden_size=16,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=256,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    if letters:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        most = tokenizer.convert_tokens_to_ids(list(letters))
        head = model.lm_head.weight.data
        loud = 20 * head[most]
        head.zero_()[most] = loud
    model.save_pretrained(folder)
    return folder


def sums(count: int = 8) -> list[dict[str, str]]:
    """Questions with answers."""
    pairs = [(a, b) for a in range(9) for b in range(3)][:count]
    return [{"question": f"What is {a} and {b}?", "answer": str(a + b)} for a, b in pairs]


def data(folder: Path, count: int = 8) -> Path:
    """train.jsonl and test.jsonl of sums."""
    rows = sums(count + 4)
    write_rows(folder / "train.jsonl", rows[:count])
    write_rows(folder / "test.jsonl", rows[count:])
    return folder


def rationale(row: dict[str, str], number: int = 0) -> dict[str, object]:
    """A right rationale."""
    return {**row, "rationale": f"Way {number}: count on to {row['answer']}.", "correct": True}


def teacher_file(path: Path, rows: Sequence[dict[str, str]], more: Sequence[dict[str, object]] = ()) -> Path:
    """Two rationales for each question, then others."""
    return write_rows(path, [rationale(row, i) for row in rows for i in range(2)] + list(more))


def solver(prompt: str, number: int) -> str:
    """What a teacher says to the two prompts about sums: its odd samples go wrong."""
    question = prompt.split("What is ")[1]
    first, _, rest = question.partition(" and ")
    answer = int(first) + int(rest.partition("?")[0])
    if prompt.endswith("the answer is"):
        return f" {answer + ('guess' in prompt)}."
    return f" I guess {answer + 1}." if number % 2 else f" Count on to {answer} --> done."


def encoder_decoder(folder: Path, seed: int = 1) -> Path:
    """A model whose encoder reads bytes and whose decoder writes them, of random weights."""
    size = save_byte_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=size,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=1,
                num_heads=2,
                pad_token_id=0,
                eos_token_id=2,
                decoder_start_token_id=0,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            )
        )
        torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    model.save_pretrained(folder)
    return folder
