"""Tokens a second of writing in batches, as a ratio to transformers' own `generate` on the same models and prompts.

Three rows: the student alone (sampled), the teacher alone, and the student repaired by the teacher (SKD), each
against `generate` of the model that could write such texts: student, teacher, and teacher with the student as its
assistant (speculative decoding, which transformers does for one row at a time). All take turns in one process.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.generation --teacher package:kdtool/quickstart/stories260k \
        --student layers:3 --data tinystories
"""

import argparse
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor

from kdtool.generation import CachedModel, Interleaving, Warp, generate, uniforms
from tests.benchmarks.step_overhead import prepare

ASSISTED = 2
"""Rows that are written with an assistant: one by one, so that few of them tell the speed."""


def timed(write: Callable[[], int]) -> tuple[int, float]:
    """Tokens written and processor seconds."""
    began = time.process_time()
    count = write()
    return count, time.process_time() - began


def own(models: list, ids: Tensor, length: int, gamma: int) -> Callable[[int], int]:
    """Writes with kdtool: one model, or a student and its teacher."""

    def write(turn: int) -> int:
        settings = Interleaving(k=25, gamma=gamma, student=Warp(0.5, 0.5), teacher=Warp(0.2, 0.5))
        uniform = uniforms([(turn, row) for row in range(len(ids))], length)
        scorers = [CachedModel(model) for model in models]
        teacher = scorers[1] if len(scorers) > 1 else None
        return int(generate(scorers[0], teacher, ids, torch.ones_like(ids), uniform, settings).valid.sum())

    return write


def theirs(models: list, ids: Tensor, length: int, gamma: int) -> Callable[[int], int]:
    """Writes with transformers: one model in a batch, or row by row with an assistant."""
    values = {"do_sample": True, "temperature": 0.5, "top_p": 0.5, "top_k": 0, "max_new_tokens": length}
    values |= {"min_new_tokens": length, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}

    def write(turn: int) -> int:
        torch.manual_seed(turn)
        if len(models) == 1:
            return int(models[0].generate(ids, **values).shape[1] - ids.shape[1]) * len(ids)
        student, teacher = models
        student.generation_config.num_assistant_tokens = gamma
        student.generation_config.num_assistant_tokens_schedule = "constant"
        alone = values | {"attention_mask": torch.ones_like(ids[:1])}
        return sum(
            int(teacher.generate(row[None], assistant_model=student, **alone).shape[1] - ids.shape[1])
            for row in ids[:ASSISTED]
        )

    return write


def measure(student: torch.nn.Module, teacher: torch.nn.Module, ids: Tensor, length: int, turns: int) -> dict:
    """Most tokens a second of processor time by kdtool and by transformers; the first turn warms up.

    Other work on the machine only ever adds to a time, so the least of each is compared.
    """
    pairs = {"student": [student], "teacher": [teacher], "repaired": [student, teacher]}
    made = {name: (own(models, ids, length, 5), theirs(models, ids, length, 5)) for name, models in pairs.items()}
    found: dict[str, tuple[list, list]] = {name: ([], []) for name in made}
    for turn in range(turns + 1):
        for name, writers in made.items():
            for rates, write in zip(found[name], writers, strict=True):
                count, seconds = timed(lambda write=write, turn=turn: write(turn))
                if turn:
                    rates.append(count / seconds)
    return {name: tuple(map(max, rates)) for name, rates in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    for name in ("teacher", "student", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    window = given.prompt + given.length
    (_, teacher, student, rows), _ = prepare(
        given.teacher, given.student, given.data, "causal-lm", 200, given.rows, 1, window
    )
    ids = torch.stack([torch.as_tensor(rows[i]["input_ids"][: given.prompt]) for i in range(given.rows)])
    models = [loaded.model.eval().requires_grad_(False) for loaded in (student, teacher)]
    transformers.logging.set_verbosity_error()
    found = measure(models[0], models[1], ids, given.length, given.turns)
    print(f"{given.rows} rows, prompts of {given.prompt} tokens, {given.length} new; torch {torch.__version__}")
    print(f"{'':<12}{'kdtool':>12}{'transformers':>14}{'ratio':>8}   tokens a second of processor time")
    for name, (ours, other) in found.items():
        print(f"{name:<12}{ours:>12.0f}{other:>14.0f}{ours / other:>8.2f}")


if __name__ == "__main__":
    main()
