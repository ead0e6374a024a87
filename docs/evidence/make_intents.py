"""Make a text-to-text task of CLINC150, and encoder-decoders of random weights for it.

    python docs/evidence/make_intents.py ../shared/data/text/clinc150 runs/intents

Rows are what a user says (`prompt`) and the words that name its intent (`response`). Writes the folder data with train,
validation and test.jsonl, and the folders teacher and student: T5 of 3 + 3 layers of width 128 and of 1 + 1 layers of
width 64, with one tokenizer of 1000 pieces learnt on the training rows.
"""

import argparse
import gzip
import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def rows_of(source: Path, split: str, names: list[str]) -> list[dict[str, str]]:
    """Prompts and responses of a split."""
    with gzip.open(source / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [{"prompt": row["text"], "response": names[row["label"]].replace("_", " ")} for row in rows]


def tokenizer_of(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Pieces of words, with an end behind each text."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=list(SPECIAL.values()), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **SPECIAL)


def model_of(width: int, layers: int, vocabulary: int) -> transformers.T5ForConditionalGeneration:
    """A T5 of random weights."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=32,
        d_ff=4 * width,
        num_layers=layers,
        num_heads=width // 32,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def main() -> None:
    """Write all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    names = json.loads((args.source / "labels.json").read_text(encoding="utf-8"))
    (args.folder / "data").mkdir(parents=True, exist_ok=True)
    splits = {split: rows_of(args.source, split, names) for split in ("train", "validation", "test")}
    for split, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (args.folder / "data" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = tokenizer_of([text for row in splits["train"] for text in row.values()])
    for name, width, layers in (("teacher", 128, 3), ("student", 64, 1)):
        model_of(width, layers, len(tokenizer)).save_pretrained(args.folder / name)
        tokenizer.save_pretrained(args.folder / name)


if __name__ == "__main__":
    main()
