"""Documents made of short texts, for studies of long inputs.

Usage: python docs/evidence/make_documents.py DATA FOLDER WORDS TRAIN TEST [SHARE]

DATA holds train.jsonl.gz or validation.jsonl.gz, and test.jsonl.gz. Rows with classes: a document is a shuffled mixture
of rows in which one class has the SHARE (default 0.4) and the others have equal parts; that class is its label. Rows
without classes follow each other; SHARE holds class names of a classifier to be calibrated then, separated by commas,
which the documents get in turn and which mean nothing.
"""

import gzip
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    """Rows of a split; validation serves for training where there is no such split."""
    name = split if (folder / f"{split}.jsonl.gz").is_file() else "validation"
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def mixed(rows: list[dict[str, Any]], words: int, count: int, share: float, seed: int) -> list[dict[str, Any]]:
    """Documents of about `words` words in which one class is more frequent than the others."""
    generator = np.random.default_rng(seed)
    classes = sorted({row["label"] for row in rows}, key=str)
    texts = {label: [row["text"] for row in rows if row["label"] == label] for label in classes}
    made = []
    for i in range(count):
        label = classes[i % len(classes)]
        chances = [share if one == label else (1 - share) / (len(classes) - 1) for one in classes]
        document: list[str] = []
        held = 0
        while held < words:
            one = classes[int(generator.choice(len(classes), p=chances))]
            document.append(texts[one][int(generator.integers(len(texts[one])))])
            held += len(document[-1].split())
        made.append({"text": " ".join(document), "label": label})
    return made


def plain(rows: list[dict[str, Any]], words: int, count: int, names: str) -> list[dict[str, Any]]:
    """Consecutive rows joined."""
    labels = names.split(",")
    stream = " ".join(row["text"] for row in rows).split()
    parts = [stream[start : start + words] for start in range(0, len(stream) - words, words)]
    return [{"text": " ".join(part), "label": labels[i % len(labels)]} for i, part in enumerate(parts[:count])]


def main(data: Path, folder: Path, words: int, train: int, test: int, share: str = "0.4") -> None:
    """Write train.jsonl and test.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, seed in (("train", train, 1), ("test", test, 2)):
        rows = rows_of(data, split)
        made = mixed(rows, words, count, float(share), seed) if "label" in rows[0] else plain(rows, words, count, share)
        text = "".join(json.dumps(row) + "\n" for row in made)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    if (data / "labels.json").is_file():
        shutil.copy(data / "labels.json", folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:6]), *sys.argv[6:7])
