"""Learning rate over a run, as a pure function of the step."""

import math
from typing import Literal


def factor(step: int, total: int, warmup: float, shape: Literal["linear", "cosine", "constant"]) -> float:
    """Share of the peak learning rate at a step.

    Args:
        step: Optimiser steps done, 0 to total - 1.
        total: Optimiser steps of the run.
        warmup: Share of the steps with linearly rising rate.
        shape: Course afterwards; linear and cosine end at 0.
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    if shape == "constant":
        return 1.0
    done = (step - rising) / max(1, total - rising)
    return 1.0 - done if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
