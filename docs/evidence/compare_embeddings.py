"""How near the embeddings of a text model with patched attention are to the exact ones, and how long both take.

Usage: python docs/evidence/compare_embeddings.py MODEL DOCUMENTS.jsonl LENGTHS COUNT SETTINGS...

MODEL is patched in all its layers with `cluster` and each of the SETTINGS in turn, such as leaf=32,near=0. An embedding
is the mean of the last hidden states. Documents are cut to the lengths; all forms read each document in turn, and
processor time counts.
"""

import json
import sys
import time
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.nn import functional

import kdtool
from kdtool import patching
from kdtool.patching.layers import body_of, find_sites


@torch.inference_mode()
def embedding(body: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean last hidden state [1, width], and seconds of processor time."""
    start = time.process_time()
    states: torch.Tensor = body(input_ids=ids).last_hidden_state
    return states.mean(1), time.process_time() - start


def patched(folder: Path, settings: str) -> nn.Module:
    """The body of the model, patched in all layers."""
    model = kdtool.load(folder)
    ids = torch.arange(5, 105)[None]
    sites = find_sites(model, lambda: model(input_ids=ids).logits)
    values = {key: int(value) for key, _, value in (part.partition("=") for part in settings.split(","))}
    patching.install(model, [patching.Layer(site.name, "cluster", values) for site in sites])
    return body_of(model)


def main(folder: Path, documents: Path, lengths: list[int], count: int, settings: list[str]) -> None:
    """Print a row for each length and each of the settings."""
    exact, others = body_of(kdtool.load(folder)), [patched(folder, one) for one in settings]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in documents.open(encoding="utf-8")][:count]
    for body in (exact, *others):
        embedding(body, torch.arange(5, 517)[None])
    print("| tokens | documents | settings | cosine, mean | cosine, least | exact | patched | speed |")
    print("|---|---|---|---|---|---|---|---|")
    for length in lengths:
        made = [tokenizer(text, truncation=True, max_length=length, return_tensors="pt")["input_ids"] for text in texts]
        made = [ids for ids in made if ids.shape[1] == length]
        turns = [[embedding(body, ids) for body in (exact, *others)] for ids in made]
        slow = min(turn[0][1] for turn in turns)
        for place, said in enumerate(settings, 1):
            cosines = [float(functional.cosine_similarity(turn[place][0], turn[0][0])) for turn in turns]
            fast = min(turn[place][1] for turn in turns)
            print(
                f"| {length} | {len(made)} | {said} | {sum(cosines) / len(cosines):.4f} | {min(cosines):.4f} "
                f"| {slow:.2f} s | {fast:.2f} s | {slow / fast:.2f}x |",
                flush=True,
            )


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        [int(one) for one in sys.argv[3].split(",")],
        int(sys.argv[4]),
        sys.argv[5:],
    )
