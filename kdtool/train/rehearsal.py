"""One step before the first, so that what cannot work fails before any work."""

import torch

from kdtool.errors import TrainingProblem
from kdtool.train.loop import Trainer


def rehearse(trainer: Trainer) -> None:
    """Run forward and backward once on the longest rows, so that what cannot work fails now.

    Raises:
        TrainingProblem: the loss is not finite.
    """
    data = trainer.plan.data
    size = min(trainer.config.batch_size, len(data))
    longest = range(size) if data.lengths is None else data.lengths.argsort()[-size:]
    trainer.method.eval()
    devices = [trainer.run.device] if trainer.run.device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        losses = trainer.method(trainer.load(longest), 0.0)
        losses.total.backward()
    trainer.method.zero_grad(set_to_none=True)
    if not torch.isfinite(losses.total):
        raise TrainingProblem(
            "the very first loss is not finite", hint="check the data and the models; --dtype float32"
        )
