"""Distil a tiny language model through the Python interface, then let it write.

Teacher and text come with kdtool. About half a minute on two CPU cores:

    python examples/distil_language_model.py --output story-student
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import kdtool
from kdtool.config import load_config

TEACHER = "package:kdtool/quickstart/stories260k"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", required=True, help="folder of the student")
    parser.add_argument("--steps", type=int, default=120, help="optimiser steps")
    parser.add_argument("--test-rows", type=int, default=None, help="stories to score on (default: all)")
    arguments = parser.parse_args()

    config = load_config(
        "distill",
        options={
            "teacher.model": TEACHER,
            "student.model": "layers:3",
            "data.source": "tinystories",
            "data.max_length": 128,
            "data.test_limit": arguments.test_rows,
            "method.name": "kd",
            "method.temperature": 1.0,
            "method.ce_weight": 0.5,
            "method.kd_weight": 0.5,
            "train.max_steps": arguments.steps,
            "train.batch_size": 16,
            "train.lr": 2e-3,
            "eval.latency": False,
            "output.folder": arguments.output,
        },
    )
    result = kdtool.distill(config)
    for row in result.table:
        print("  ".join(cell.ljust(16) for cell in row))

    # the folder is an ordinary transformers model
    tokenizer = AutoTokenizer.from_pretrained(arguments.output)
    student = AutoModelForCausalLM.from_pretrained(arguments.output, dtype="float32")
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    story = student.generate(**prompt, max_new_tokens=60, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    print(tokenizer.decode(story[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
