"""Let a teacher write texts, and judge the students of a comparison on them.

    python docs/evidence/teacher_text.py write package:kdtool/quickstart/stories260k runs/teacher-stories
    python docs/evidence/teacher_text.py judge runs/methods-stories runs/teacher-stories

`write` samples whole texts from the teacher at temperature 1, each from the beginning-of-sequence token. `judge`
scores every student under COMPARISON/runs on them, lets each write texts of its own and asks the teacher what they
are worth, and prints mean and standard deviation over seeds.
"""

import argparse
import json
import re
import statistics
from pathlib import Path

import torch

from kdtool.config import load_config
from kdtool.generation import CachedModel, Generated, Interleaving, generate, uniforms
from kdtool.models import Loaded, load_model
from kdtool.pipelines.evaluate import evaluate
from kdtool.pipelines.setup import load_processor
from kdtool.registry import TASKS
from kdtool.run import Run

METRICS = ("loss", "perplexity", "token-accuracy", "agreement")
OWN = "KL(q||p)"
"""Nats a token by which a student finds its own texts likelier than the teacher does: the reverse KL of whole texts."""


def opened(reference: str) -> Loaded:
    """A causal language model and its tokenizer."""
    run, task = Run(offline=True), TASKS.get("causal-lm")()
    loaded = load_model(reference, task.auto_class, run)
    load_processor(loaded, task, run)
    loaded.model.eval()
    return loaded


def sampled(loaded: Loaded, rows: int, length: int) -> tuple[Generated, int]:
    """Texts of a model at temperature 1, and the token that they begin with."""
    begin = int(loaded.processor.bos_token_id)
    ids = torch.full((rows, 1), begin)
    settings = Interleaving(stop=(begin, int(loaded.processor.eos_token_id)), scored=True)
    uniform = uniforms([(0, row) for row in range(rows)], length)
    return generate(CachedModel(loaded.model), None, ids, torch.ones_like(ids), uniform, settings), begin


@torch.no_grad()
def excess(student: Loaded, teacher: Loaded, rows: int = 64, length: int = 64) -> float:
    """`OWN`, estimated on samples."""
    out, begin = sampled(student, rows, length)
    ids = torch.nn.functional.pad(out.tokens, (1, 0), value=begin)
    log_p = teacher.model(input_ids=ids[:, :-1]).logits.double().log_softmax(-1)
    there = log_p.gather(-1, out.tokens[..., None])[..., 0]
    return float((out.log_prob - there)[out.valid].mean())


def write(teacher: str, folder: Path, rows: int, length: int) -> None:
    """`rows` texts of at most `length` tokens, to folder/test.jsonl."""
    loaded = opened(teacher)
    out, _ = sampled(loaded, rows, length)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "test.jsonl").open("w", encoding="utf-8") as file:
        for tokens, valid in zip(out.tokens, out.valid, strict=True):
            file.write(json.dumps({"text": loaded.processor.decode(tokens[valid], skip_special_tokens=True)}) + "\n")


def show(names: tuple[str, ...], teacher: dict[str, float], found: dict[str, list[dict[str, float]]]) -> None:
    """Print a table with a row for each method: mean and standard deviation over seeds."""
    print(f"| method | {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}")
    print("| (teacher) | " + " | ".join(f"{teacher[m]:.4f}" if m in teacher else "-" for m in names) + " |")
    for method, runs in found.items():
        cells = []
        for name in names:
            values = [run[name] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{statistics.fmean(values):.4f} ± {spread:.4f}")
        print(f"| {method} | {' | '.join(cells)} |")
    print()


def judge(comparison: Path, texts: Path) -> None:
    """Print what the runs measured on the test rows, and then how their students do on the teacher's texts."""
    tested: dict[str, list[dict[str, float]]] = {}
    found: dict[str, list[dict[str, float]]] = {}
    for folder in sorted((comparison / "runs").glob("*-seed*")):
        manifest = json.loads((folder / "kdtool.json").read_text(encoding="utf-8"))
        made, method = manifest["config"], re.sub(r"-seed\d+$", "", folder.name)
        tested.setdefault(method, []).append(manifest["metrics"]["student"])
        options = {"teacher.model": made["teacher"]["model"], "student.model": str(folder), "data.source": str(texts)}
        options |= {"data.task": "causal-lm", "data.max_length": made["data"]["max_length"], "eval.latency": False}
        result = evaluate(load_config("evaluate", None, [], options))
        own = excess(opened(str(folder)), opened(made["teacher"]["model"]))
        found.setdefault(method, []).append(result.proof.student.metrics | {OWN: own})
    show(METRICS, manifest["metrics"]["teacher"], tested)
    show((*METRICS, OWN), result.proof.teacher.metrics, found)


def main() -> None:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("teacher")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--rows", type=int, default=60)
    writing.add_argument("--length", type=int, default=256)
    judging = commands.add_parser("judge")
    judging.add_argument("comparison", type=Path)
    judging.add_argument("texts", type=Path)
    given = parser.parse_args()
    if given.command == "write":
        write(given.teacher, given.folder, given.rows, given.length)
    else:
        judge(given.comparison, given.texts)


if __name__ == "__main__":
    main()
