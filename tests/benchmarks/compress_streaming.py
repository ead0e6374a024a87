"""Peak memory of working weight by weight: a generated checkpoint of 2 GiB under a limit of 1 GiB.

The limit is RLIMIT_DATA of the process that does the work: all private memory, Python and torch included. Pages
of files that are read are the system's, and can be dropped at any time; the peak resident size counts them.

    python -m tests.benchmarks.compress_streaming --folder build/big
"""

import argparse
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

from kdtool import lazy
from tests import tiny

GIB = 2**30
COMMANDS = {
    "layers": ["compress", "--method", "layers"],
    "quantize int8": ["compress", "--method", "quantize"],
    "quantize int4": ["compress", "--method", "quantize", "--set", "method.scheme=int4"],
    "layers, then quantize": ["compress", "--method", "layers,quantize"],
    "sparse": ["compress", "--method", "sparse"],
    "average": ["compress", "--method", "average"],
    "float16 to bfloat16": ["export", "--set", "output.dtype=bfloat16"],
}


def generate(folder: Path, size: float) -> int:
    """A Llama in float16 of at least `size` bytes, in shards of 256 MiB; returns its size."""
    width, each = 2048, 0.0
    layers = 0
    while each < size:
        layers += 1
        config = transformers.LlamaConfig(
            vocab_size=32000, hidden_size=width, intermediate_size=5632, num_hidden_layers=layers,
            num_attention_heads=16, num_key_value_heads=8, dtype=torch.float16, tie_word_embeddings=True,
            bos_token_id=2, eos_token_id=3,
        )  # fmt: skip
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        each = 2.0 * sum(p.numel() for p in model.parameters())
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float16).uniform_(-0.03, 0.03, generator=generator)

    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    state = {name: lazy.Lazy(s, torch.float16, lambda s=s: draw(s)) for name, s in shapes.items()}  # type: ignore[misc]
    for _ in lazy.write(state, folder, 256 * 2**20, {}):
        pass
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tiny.save_lm_tokenizer(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def run(arguments: list[str], limit: int) -> tuple[int, float, float]:
    """Exit code, peak resident size in bytes and seconds of a command under the limit."""

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    code = (
        "import resource, sys; from kdtool.cli import app; done = app.run(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(done)"
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--quiet", "--offline"],
        preexec_fn=bound,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        print(done.stderr[-500:])
    return done.returncode, 1024.0 * float(done.stdout.split()[-1]), seconds


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", type=float, default=2.0, help="GiB of the checkpoint")
    parser.add_argument("--limit", type=float, default=1.0, help="GiB of private memory")
    parser.add_argument("--only", choices=COMMANDS, help="one of the commands")
    given = parser.parse_args(arguments)
    source, out = given.folder / "model", given.folder / "out"
    if not source.is_dir():
        generate(source, given.size * GIB)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    shards = len(list(source.glob("*.safetensors")))
    print(f"checkpoint of {size / GIB:.2f} GiB in {shards} files, limit {given.limit:g} GiB of private memory\n")
    print("| command | exit code | peak resident size | seconds | result |\n| --- | ---: | ---: | ---: | ---: |")
    worst = 0
    for name in [given.only] if given.only else COMMANDS:
        verb, *options = COMMANDS[name]
        shutil.rmtree(out, ignore_errors=True)
        if name == "average":
            options += ["--set", f"method.models=[{source}]"]
        words = [verb, str(source), *options, "-o", str(out), "--set", "output.max_shard_size=256MiB"]
        code, peak, seconds = run(words, int(given.limit * GIB))
        made = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        print(f"| {name} | {code} | {peak / 2**20:.0f} MiB | {seconds:.0f} | {made / GIB:.2f} GiB |", flush=True)
        worst = max(worst, code)
    shutil.rmtree(out, ignore_errors=True)
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
