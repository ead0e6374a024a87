"""Linear maps in shapes of their own: products of two thin ones, and ones with fewer inputs or outputs."""

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def shape_of(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear map; GPT-2 stores its own the other way round."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return module.in_features, module.out_features


class LowRankLinear(nn.Module):
    """y = B (A x) + b with A [rank, inputs] and B [outputs, rank]."""

    def __init__(self, inputs: int, rank: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, rank, bias=False)
        self.outer = nn.Linear(rank, outputs, bias=bias)

    @classmethod
    def replacing(cls, old: Any, spec: Mapping[str, Any], whole: nn.Module) -> Self:
        """A map of `rank` in the place of a whole one."""
        inputs, outputs = shape_of(old)
        return cls(inputs, int(spec["rank"]), outputs, old.bias is not None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        y: Tensor = self.outer(self.inner(x))
        return y


class ResizedLinear(nn.Linear):
    """A linear map with other numbers of inputs and outputs than the model's configuration implies."""

    @classmethod
    def replacing(cls, old: Any, spec: Mapping[str, Any], whole: nn.Module) -> Self:
        """A map of `inputs` and `outputs`."""
        return cls(int(spec["inputs"]), int(spec["outputs"]), bias=old.bias is not None)
