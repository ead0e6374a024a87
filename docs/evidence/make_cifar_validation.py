"""CIFAR-10 images that were not trained on, to choose a setting by.

Usage: python docs/evidence/make_cifar_validation.py ../shared/data/cifar10/jpeg 12000 5000 runs/cifar10-validation

`train` gets the training images that `--limit 12000` draws with seed 0, `test` the first 5,000 of the others.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from kdtool.data.splits import choose


def main(data: Path, drawn: int, count: int, folder: Path) -> None:
    """Write train.parquet and test.parquet."""
    table = pq.read_table(data / "train.parquet")
    seen = choose(len(table), drawn, 0)
    assert seen is not None
    others = np.setdiff1d(np.arange(len(table)), seen)[:count]
    folder.mkdir(parents=True)
    pq.write_table(table.take(seen), folder / "train.parquet")
    pq.write_table(table.take(others), folder / "test.parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
