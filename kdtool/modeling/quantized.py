"""Weights as whole numbers of 8 or 4 bits times scales, in plain tensors that safetensors stores.

A matrix [rows, columns] is kept as `codes`: int8 [rows, columns], or uint8 [rows, ceil(columns / 2)] with two
numbers of 4 bits in each byte, the even column in the lower half; and `scale` [rows, groups], where each
group of neighbouring columns of a row has one. w = code * scale, so zero stays zero.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdtool.lazy import row_blocks
from kdtool.modeling.linear_forms import shape_of

_OFFSET = 8
"""Added to numbers of 4 bits before they are packed, so that none is negative."""
_CLIPS = (0.95, 0.9, 0.85, 0.8, 0.75)
"""Shares of the largest weight of a group that 4 bits may reach instead of all of it, where that errs less."""


def groups_of(columns: int, group: int | None) -> int:
    """Number of groups of a row: one where it cannot be cut evenly."""
    return columns // group if group and columns % group == 0 else 1


def quantize(weight: Tensor, bits: int, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Round a matrix to whole numbers; symmetric, to the nearest.

    Args:
        weight: [rows, columns].
        bits: 8 or 4.
        group: Columns that share a scale (default: all of a row).

    Returns:
        Codes and scale, as the module says; the scale in float32.
    """
    blocks = [_round(weight[rows], bits, groups_of(weight.shape[1], group)) for rows in row_blocks(weight)]
    codes, scales = zip(*blocks, strict=True)
    return torch.cat(codes), torch.cat(scales)


def _round(weight: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor]:
    """As `quantize`, for some rows; of several scales each group takes the one with the least squared error."""
    top = 2 ** (bits - 1) - 1
    parts = weight.float().reshape(len(weight), groups, -1)
    largest = parts.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    scale = largest / top
    codes = (parts / scale).round_().clamp_(-top, top)
    error = (codes * scale - parts).square_().sum(-1, keepdim=True)
    for clip in _CLIPS if bits < 8 else ():
        smaller = largest * (clip / top)
        tried = (parts / smaller).round_().clamp_(-top, top)
        worse = (tried * smaller - parts).square_().sum(-1, keepdim=True) >= error
        codes, scale = torch.where(worse, codes, tried), torch.where(worse, scale, smaller)
        error = torch.minimum(error, (codes * scale - parts).square_().sum(-1, keepdim=True))
    whole = codes.reshape(weight.shape).to(torch.int8)
    return (pack(whole) if bits == 4 else whole), scale.squeeze(-1)


def pack(codes: Tensor) -> Tensor:
    """Two numbers from -8 to 7 in a byte: int8 [rows, columns] to uint8 [rows, ceil(columns / 2)]."""
    shifted = functional.pad(codes + _OFFSET, (0, codes.shape[1] % 2)).to(torch.uint8)
    return shifted[:, ::2] | (shifted[:, 1::2] << 4)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack`; any dimensions may stand before the last."""
    if torch.compiler.is_exporting():
        whole = packed.int()  # other runtimes have no bitwise kernels for bytes
        upper = torch.div(whole, 16, rounding_mode="floor")
        both = torch.stack((whole - 16 * upper, upper), dim=-1).flatten(-2)
    else:
        both = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return both[..., :columns].to(torch.int8) - _OFFSET


def dequantize(codes: Tensor, scale: Tensor, columns: int) -> Tensor:
    """The numbers [..., columns] that codes and scale [..., groups] stand for, in the number format of the scale."""
    whole = codes if codes.dtype == torch.int8 else unpack(codes, columns)
    groups = scale.shape[-1]
    parts: Tensor = whole.to(scale.dtype).unflatten(-1, (groups, columns // groups))  # type: ignore[no-untyped-call]
    return (parts * scale.unsqueeze(-1)).flatten(-2)


class _Quantized(nn.Module):
    """Codes and scale of a matrix."""

    codes: Tensor
    scale: Tensor

    def __init__(self, rows: int, columns: int, bits: int, group: int | None) -> None:
        super().__init__()
        self.rows, self.columns, self.bits = rows, columns, bits
        width, kind = (columns, torch.int8) if bits == 8 else ((columns + 1) // 2, torch.uint8)
        self.register_buffer("codes", torch.zeros(rows, width, dtype=kind))
        self.register_buffer("scale", torch.ones(rows, groups_of(columns, group)))

    @property
    def packed(self) -> int:
        """How many weights the codes stand for."""
        return self.rows * self.columns

    def matrix(self) -> Tensor:
        """Weights [rows, columns]."""
        return dequantize(self.codes, self.scale, self.columns)


class QuantizedLinear(_Quantized):
    """y = W x + b with quantised W; with `dynamic` the inputs are rounded, too, by a scale of the batch at hand.

    Without it the weights are turned back into floating-point numbers in each pass: less memory, no less
    arithmetic. With it torch's kernels for whole numbers compute the product where there are such for the
    processor; elsewhere the inputs are rounded and the product is computed in floating point.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, bits: int, group: int | None, dynamic: bool) -> None:
        super().__init__(outputs, inputs, bits, group)
        self.dynamic = dynamic
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False) if bias else None
        self._ready: Any = None

    @classmethod
    def replacing(cls, old: Any, spec: Mapping[str, Any], whole: nn.Module) -> Self:
        """A map with `bits`, and where stated `group` and `dynamic`."""
        inputs, outputs = shape_of(old)
        has_bias, dynamic = old.bias is not None, bool(spec.get("dynamic"))
        return cls(inputs, outputs, has_bias, int(spec["bits"]), spec.get("group"), dynamic)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the kernel's own copy of the weights, which cannot be copied."""
        return {**self.__dict__, "_ready": None}

    def _apply(self, *args: Any, **options: Any) -> Self:
        self._ready = None  # made of weights that are about to change
        return super()._apply(*args, **options)  # type: ignore[no-any-return, no-untyped-call]

    def _kernel(self) -> Any:
        """The weights as torch's dynamic kernel wants them."""
        if self._ready is None:
            zeros = torch.zeros(self.rows, dtype=torch.int64)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # this way in is deprecated, and no other one is as fast everywhere
                weight = _WRAP(self.codes, self.scale[:, 0].double(), zeros, 0)
                bias = None if self.bias is None else self.bias.detach().float()
                self._ready = torch.ops.quantized.linear_prepack(weight, bias)
        return self._ready

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        if not self.dynamic:
            return functional.linear(x, self.matrix().to(x.dtype), self.bias)
        fits = x.device.type == "cpu" and x.dtype == torch.float32
        if _WRAP and fits and torch.backends.quantized.engine in _ENGINES:
            # without reduced range the kernels of processors without VNNI overflow
            y: Tensor = torch.ops.quantized.linear_dynamic(x.contiguous(), self._kernel(), reduce_range=True)
            return y
        step = x.abs().amax().clamp_min(torch.finfo(x.dtype).tiny) / 127
        return functional.linear((x / step).round() * step, self.matrix().to(x.dtype), self.bias)


_ENGINES = ("x86", "fbgemm", "onednn")
"""Engines whose dynamic kernel takes a scale for each row of the weights."""
_WRAP: Any = getattr(torch, "_make_per_channel_quantized_tensor", None)
"""Makes the tensor that the kernel wants; torch has announced that it will go, and the products are then in floats."""


class QuantizedEmbedding(_Quantized):
    """A table whose rows are turned back into floating-point numbers as they are looked up."""

    @classmethod
    def replacing(cls, old: Any, spec: Mapping[str, Any], whole: nn.Module) -> Self:
        """A table with `bits`, and where stated `group`."""
        return cls(old.num_embeddings, old.embedding_dim, int(spec["bits"]), spec.get("group"))

    def forward(self, ids: Tensor) -> Tensor:
        """[...] int64 to [..., columns]."""
        return dequantize(self.codes[ids], self.scale[ids], self.columns)


class TiedHead(nn.Module):
    """Logits by the table of the embeddings, which stays the embeddings' own."""

    def __init__(self, table: QuantizedEmbedding, bias: bool) -> None:
        super().__init__()
        self._table = [table]  # in a list it is no part of this module
        self.bias = nn.Parameter(torch.zeros(table.rows), requires_grad=False) if bias else None

    @classmethod
    def replacing(cls, old: Any, spec: Mapping[str, Any], whole: nn.Module) -> Self:
        """A head on the quantised embedding at path `to`."""
        table: Any = whole.get_submodule(spec["to"])
        return cls(table, old.bias is not None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., rows of the table]."""
        return functional.linear(x, self._table[0].matrix().to(x.dtype), self.bias)
