"""Write scikit-learn's digits as an image folder: 400 training and 1,397 test images.

Usage: python docs/evidence/make_digits.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def main(folder: Path) -> None:
    """Write `FOLDER/{train,test}/CLASS/NUMBER.png`, split with seed 0."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    for position, row in enumerate(order):
        split = "train" if position < 400 else "test"
        target = folder / split / str(digits.target[row])
        target.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(digits.images[row] * 16, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(target / f"{row}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
