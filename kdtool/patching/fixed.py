"""Projections fixed when a model is patched: with them an operator decomposes and draws nothing in a call.

A graph for another runtime needs them, since ONNX has no eigenvectors and draws anew in each run.
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from kdtool.attention._base import State
from kdtool.attention._blocks import group
from kdtool.attention._tree import levels_for
from kdtool.attention.cluster import Config
from kdtool.errors import UsageProblem
from kdtool.patching.interface import Layer
from kdtool.patching.saving import layers_of


def _cluster(q: Tensor, k: Tensor, v: Tensor) -> State:
    """Directions of the trees over queries, keys and values, with blocks of the default size."""
    rows = q[0].reshape(k.shape[1], -1, q.shape[-1])
    return group(rows, k[0], v[0], None, None, levels_for(rows.shape[1], Config().block)).directions


_MAKERS: Mapping[str, Callable[[Tensor, Tensor, Tensor], State]] = {"cluster": _cluster}


def check_fixable(method: str) -> None:
    """Refuse an operator whose projections cannot be fixed.

    Raises:
        UsageProblem: it draws in each call.
    """
    if method not in _MAKERS:
        raise UsageProblem(
            f"patch.fixed does not apply to {method}",
            why="it draws, or works out all it needs, anew for each input",
            hint=f"--method {' or '.join(_MAKERS)}",
        )


def fix(method: str, q: Tensor, k: Tensor, v: Tensor) -> State:
    """What an operator would work out from each input, worked out once from calibration rows.

    Args:
        method: Operator that `check_fixable` lets pass.
        q: [1, Hq, n, d] queries of real inputs.
        k: [1, Hkv, n, d] their keys.
        v: [1, Hkv, n, dv] their values.
    """
    return _MAKERS[method](q, k, v)


def patched_layers(model: nn.Module) -> list[Layer]:
    """What a model's approximated attention modules were patched with."""
    return [layer for layer in layers_of(model) if layer.reason is None]


def check_exportable(model: nn.Module, ref: str) -> bool:
    """See whether the graph of a model can hold its patched attention.

    Returns:
        True for a patched model whose projections are fixed; False for one without a patched layer.

    Raises:
        UsageProblem: a layer cannot be exported; the hint names an operator that can.
    """
    patched = patched_layers(model)
    for layer in patched:
        if layer.method not in _MAKERS:
            raise UsageProblem(
                f"the attention {layer.method} of '{ref}' cannot be exported",
                why=f"module '{layer.name}' draws, or works out all it needs, anew for each input",
                hint=f"patch it with --method {' or '.join(_MAKERS)} --set patch.fixed=true",
            )
        if not layer.state:
            raise UsageProblem(
                f"the patched attention of '{ref}' cannot be exported",
                why=f"module '{layer.name}' works out its projections from each input",
                hint="patch it with --set patch.fixed=true",
            )
    return bool(patched)
