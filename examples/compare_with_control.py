"""Was the teacher worth it? The same student with and without one, over seeds, at equal budgets.

Teacher and text come with kdtool. Under a minute on two CPU cores:

    python examples/compare_with_control.py --output comparison
"""

import argparse

from kdtool.config import load_config
from kdtool.pipelines import compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", required=True, help="folder of the comparison")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of each method")
    parser.add_argument("--test-rows", type=int, default=None, help="stories to score on (default: all)")
    arguments = parser.parse_args()

    config = load_config(
        "compare",
        overrides=["method.kd={temperature: 1.0, ce_weight: 0.5, kd_weight: 0.5}"],
        options={
            "teacher.model": "package:kdtool/quickstart/stories260k",
            "student.model": "layers:3",
            "data.source": "tinystories",
            "data.max_length": 128,
            "data.test_limit": arguments.test_rows,
            "method.name": "none,kd",
            "train.max_steps": arguments.steps,
            "train.batch_size": 16,
            "train.lr": 2e-3,
            "eval.seeds": arguments.seeds,
            "eval.latency": False,
            "eval.reload": False,
            "output.folder": arguments.output,
        },
    )
    result = compare(config)
    for row in result.extra["comparison"]:
        print("  ".join(cell.ljust(16) for cell in row))

    mean = {name: found["mean"]["token-accuracy"] for name, found in result.extra["methods"].items()}
    print(f"the teacher is worth {mean['kd'] - mean['none']:+.4f} token accuracy after {arguments.steps} steps")


if __name__ == "__main__":
    main()
