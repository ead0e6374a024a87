"""Pairs of tiny CIFAR ResNets and a random batch of images, for methods that compare maps."""

import numpy as np
import torch

from kdtool.data.examples import Examples
from kdtool.modeling.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from kdtool.models import Loaded
from kdtool.registry import METHODS, TASKS
from kdtool.tasks._base import ROWS
from tests import tiny


def network(widths, n=1, seed=0):
    torch.manual_seed(seed)
    model = CifarResNetForImageClassification(CifarResNetConfig(n=n, widths=widths, **tiny.names_of()))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=0.5)
    return Loaded(model.eval(), None, "network")


def rows(size=12):
    generator = np.random.default_rng(0)
    pixels = generator.normal(size=(size, 3, 16, 16)).astype(np.float32)
    return Examples({"pixel_values": pixels, "labels": np.arange(size) % len(tiny.LABELS)})


def batch_of(data, numbers):
    task = TASKS.get("image-classification")()
    return task.collate([data[i] for i in numbers]) | {ROWS: torch.tensor(numbers)}


def build(name, student=(4, 8, 8), teacher=(8, 8, 16), data=None, **values):
    """A method with two networks of these widths, set up."""
    data = data or rows()
    task = TASKS.get("image-classification")()
    pair = network(student, seed=1), network(teacher, n=2, seed=2)
    method = METHODS.get(name)(METHODS.build_config(name, values), pair[0], [pair[1]], task)
    torch.manual_seed(3)
    method.setup(batch_of(data, [0, 1]), data)
    return method
