"""How near the embeddings of a patched text model are to those of its exact form, and how long both take.

Usage: python docs/evidence/compare_embeddings.py PATCHED DOCUMENTS.jsonl LENGTHS COUNT

An embedding is the mean of the last hidden states. Documents are cut to the lengths; both forms read each document in
turn, and process time counts, with one warm-up.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

import kdtool
from kdtool import patching
from kdtool.patching.layers import body_of


@torch.inference_mode()
def embedding(body: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean last hidden state [1, width], and seconds of process time."""
    start = time.process_time()
    states = body(input_ids=ids).last_hidden_state
    return states.mean(1), time.process_time() - start


def main(folder: Path, documents: Path, lengths: list[int], count: int) -> None:
    """Print a row for each length."""
    import transformers

    patched, exact = (body_of(kdtool.load(folder)) for _ in range(2))
    patching.remove(exact)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in documents.open(encoding="utf-8")][:count]
    print("| tokens | documents | cosine, mean | cosine, least | exact | patched | speed | approximate calls |")
    print("|---|---|---|---|---|---|---|---|")
    for length in lengths:
        made = [tokenizer(text, truncation=True, max_length=length, return_tensors="pt")["input_ids"] for text in texts]
        made = [ids for ids in made if ids.shape[1] == length]
        cosines, times = [], ([], [])
        with patching.counting() as calls:
            embedding(patched, made[0])
        embedding(exact, made[0])
        for ids in made:
            (near, short), (truth, long) = embedding(patched, ids), embedding(exact, ids)
            cosines.append(float(functional.cosine_similarity(near, truth)))
            times[0].append(long)
            times[1].append(short)
        slow, fast = (float(torch.tensor(one).median()) for one in times)
        print(
            f"| {length} | {len(made)} | {sum(cosines) / len(cosines):.4f} | {min(cosines):.4f} | {slow:.2f} s "
            f"| {fast:.2f} s | {slow / fast:.2f}x | {calls.approximate} of {calls.total} |",
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(one) for one in sys.argv[3].split(",")], int(sys.argv[4]))
