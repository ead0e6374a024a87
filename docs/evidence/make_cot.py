"""Folders for docs/evidence/mentor-kd.md: questions with answers, and a small model that has not been trained.

    python docs/evidence/make_cot.py SET FOLDER

SET is last_letter_concatenation, svamp or asdiv; FOLDER gets `data` (train, validation, test) and `start` (the
configuration and the tokenizer of a model to be trained). Words that many training questions share are tokens,
all others are spelt letter by letter, numbers digit by digit: small models could not learn letters inside of tokens.
"""

import gzip
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SOURCE = Path("../shared/data/text/cot_teacher")
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
VALIDATION = 50
SHARED = {"last_letter_concatenation": 30, "svamp": 4, "asdiv": 4}
"""In how many questions or their rationales a word must come to be a token."""
LAYERS, WIDTH = 4, 128


def rows_of(name: str) -> list[dict[str, str]]:
    """Rows of a file of the source."""
    with gzip.open(SOURCE / f"{name}.jsonl.gz", "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tokenizer(rows: list[dict[str, str]], least: int) -> transformers.PreTrainedTokenizerFast:
    """Words of at least so many questions, and characters."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for word in re.findall(r"[A-Za-z]+", f"{row['question']} {row['rationale']}"):
            found.setdefault(word, set()).add(row["question"])
    words = sorted(word for word, questions in found.items() if len(questions) >= least and len(word) > 1)
    letters = [chr(i) for i in range(33, 127)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*SPECIAL.values(), *letters, *words]))}
    for letter in letters:
        vocabulary.setdefault(f"##{letter}", len(vocabulary))
    model = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL["unk_token"]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation(), digits])
    # the mark before an answer is three tokens, and one word of the text
    model.decoder = decoders.Sequence([decoders.WordPiece(), decoders.Fuse(), decoders.Replace("- - >", "-->")])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **SPECIAL)


def main(name: str, folder: Path) -> None:
    """Write the folders."""
    rows = rows_of(f"{name}_train")
    answers = {row["question"]: row["answer"] for row in rows}
    questions = [str(one) for one in np.random.default_rng(0).permutation(list(answers))]
    parts = {"validation": questions[:VALIDATION], "train": questions[VALIDATION:]}
    for part, chosen in parts.items():
        write(folder / "data" / f"{part}.jsonl", [{"question": q, "answer": answers[q]} for q in chosen])
    test = [{"question": row["question"], "answer": row["answer"]} for row in rows_of(f"{name}_test")]
    write(folder / "data" / "test.jsonl", test)
    training = set(parts["train"])
    made = tokenizer([row for row in rows if row["question"] in training], SHARED[name])
    transformers.LlamaConfig(
        vocab_size=len(made),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 32,
        intermediate_size=3 * WIDTH,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=made.pad_token_id,
        bos_token_id=made.bos_token_id,
        eos_token_id=made.eos_token_id,
    ).save_pretrained(folder / "start")
    made.save_pretrained(folder / "start")
    lengths = Counter(len(made(row["question"] + " " + row["rationale"])["input_ids"]) // 50 * 50 for row in rows)
    print(f"{len(made)} tokens; rows of training by length: {sorted(lengths.items())}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
