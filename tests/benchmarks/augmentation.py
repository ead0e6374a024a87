"""What altered images cost, beside a training step of a CIFAR ResNet-20 and beside kornia's own modules.

    python -m tests.benchmarks.augmentation [BATCH]

Prints the median milliseconds for a batch of 32x32 images (default 128), without the plain collation,
and their share of a step: forward, backward and update of ResNet-20, without a teacher.
"""

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from kornia import augmentation as peer
from kornia.augmentation.auto import RandAugment

from kdtool.data.examples import Examples
from kdtool.modeling.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification, image_processor
from kdtool.sections import AugmentSection
from kdtool.tasks._views import PIXELS, ImageViews, collated
from kdtool.tasks.image_classification import Task

SETTINGS = {
    "crop, flip": {"crop": 0.125, "flip": True},
    "crop, flip, mixup": {"crop": 0.125, "flip": True, "mixup": 0.2},
    "crop, flip, cutmix": {"crop": 0.125, "flip": True, "cutmix": 1.0},
    "crop, flip, randaugment": {"crop": 0.125, "flip": True, "randaugment": 2},
}


def median_ms(call: Callable[[], object], repeats: int = 9) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 128
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    pixels = generator.normal(size=(4 * size, 3, 32, 32)).astype(np.float32)
    data = Examples({PIXELS: pixels, "labels": generator.integers(0, 10, 4 * size)})
    task, numbers = Task(), generator.permutation(4 * size)[:size]
    model = CifarResNetForImageClassification(CifarResNetConfig(n=3, num_labels=10)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batch = collated(task, data, numbers, "cpu")

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    whole, plain = median_ms(step, 5), median_ms(lambda: collated(task, data, numbers, "cpu"))
    print(f"ResNet-20 step, {size} images: {whole:.0f} ms; plain collation {plain:.1f} ms ({plain / whole:.1%})")
    for name, values in SETTINGS.items():
        views = ImageViews(task, data, AugmentSection(**values), {"": image_processor()}, 10)
        cost = median_ms(lambda made=views: made.batch(numbers, "cpu")) - plain
        print(f"{name:26} {cost:7.1f} ms  {cost / whole:6.1%} of a step")
    unit = torch.rand(size, 3, 32, 32)
    peers = {
        "kornia: crop, flip": torch.nn.Sequential(peer.RandomCrop((32, 32), padding=4), peer.RandomHorizontalFlip()),
        "kornia: RandAugment": RandAugment(2, 9),
    }
    for name, module in peers.items():
        cost = median_ms(lambda made=module: made(unit))
        print(f"{name:26} {cost:7.1f} ms  {cost / whole:6.1%} of a step")


if __name__ == "__main__":
    main()
