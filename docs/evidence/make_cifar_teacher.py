"""Turn a published CIFAR-10 ResNet checkpoint into a model folder, and give the student its processor.

Usage: python docs/evidence/make_cifar_teacher.py CHECKPOINT.safetensors FOLDER
"""

import sys
from pathlib import Path

from kdtool.modeling.cifar_resnet import from_checkpoint, image_processor

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def main(checkpoint: Path, folder: Path) -> None:
    """Write the teacher; the student's configuration folder in docs/evidence gets the same processor."""
    from_checkpoint(checkpoint, CLASSES).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    image_processor().save_pretrained(Path(__file__).parent / "recipes" / "cifar10-student")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
