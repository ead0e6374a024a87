"""Let a teacher write texts, and judge the students of a comparison on them.

    python docs/evidence/teacher_text.py write package:kdtool/quickstart/stories260k runs/teacher-stories
    python docs/evidence/teacher_text.py judge runs/methods-stories runs/teacher-stories

`write` samples whole texts from the teacher at temperature 1, each from the beginning-of-sequence token. `judge`
scores every student under COMPARISON/runs and prints mean and standard deviation over seeds.
"""

import argparse
import json
import re
import statistics
from pathlib import Path

import torch

from kdtool.config import load_config
from kdtool.generation import CachedModel, Interleaving, generate, uniforms
from kdtool.models import load_model
from kdtool.pipelines.evaluate import evaluate
from kdtool.pipelines.setup import load_processor
from kdtool.registry import TASKS
from kdtool.run import Run

METRICS = ("loss", "perplexity", "token-accuracy", "agreement")


def write(teacher: str, folder: Path, rows: int, length: int) -> None:
    """`rows` texts of at most `length` tokens, to folder/test.jsonl."""
    run, task = Run(offline=True), TASKS.get("causal-lm")()
    loaded = load_model(teacher, task.auto_class, run)
    load_processor(loaded, task, run)
    tokenizer = loaded.processor
    begin = int(tokenizer.bos_token_id)
    ids = torch.full((rows, 1), begin)
    settings = Interleaving(stop=(begin, int(tokenizer.eos_token_id)))
    uniform = uniforms([(0, row) for row in range(rows)], length)
    out = generate(CachedModel(loaded.model.eval()), None, ids, torch.ones_like(ids), uniform, settings)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "test.jsonl").open("w", encoding="utf-8") as file:
        for tokens, valid in zip(out.tokens, out.valid, strict=True):
            file.write(json.dumps({"text": tokenizer.decode(tokens[valid], skip_special_tokens=True)}) + "\n")


def judge(comparison: Path, texts: Path) -> None:
    """Print a table with a row for each method."""
    found: dict[str, list[dict[str, float]]] = {}
    for folder in sorted((comparison / "runs").glob("*-seed*")):
        made = json.loads((folder / "kdtool.json").read_text(encoding="utf-8"))["config"]
        options = {"teacher.model": made["teacher"]["model"], "student.model": str(folder), "data.source": str(texts)}
        options |= {"data.task": "causal-lm", "data.max_length": made["data"]["max_length"], "eval.latency": False}
        result = evaluate(load_config("evaluate", None, [], options))
        name = re.sub(r"-seed\d+$", "", folder.name)
        found.setdefault(name, []).append(result.proof.student.metrics)
        teacher = result.proof.teacher.metrics
    print(f"| method | {' | '.join(METRICS)} |\n| --- |{' ---: |' * len(METRICS)}")
    print("| (teacher) | " + " | ".join(f"{teacher[m]:.4f}" if m in teacher else "-" for m in METRICS) + " |")
    for name, runs in found.items():
        cells = []
        for metric in METRICS:
            values = [run[metric] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{statistics.fmean(values):.4f} ± {spread:.4f}")
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("teacher")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--rows", type=int, default=150)
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
