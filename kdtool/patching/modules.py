"""Attention modules with one fused projection, as timm and many own models have them, led through the interface.

Such a module has `qkv` (a linear layer from w to 3 w features), `proj` and `num_heads`; what else it may
have (`q_norm`, `k_norm`, `norm`, `proj_drop`, `scale`) is used where it is there.
"""

import fnmatch
import types
from typing import Any

from torch import Tensor, nn

from kdtool.errors import ModelProblem
from kdtool.patching import interface

_MARK = "kde_wrapped"


def wrap(model: nn.Module, pattern: str) -> list[str]:
    """Lead the modules whose names match through the attention function; repeated calls change nothing.

    Args:
        model: The model, changed in place.
        pattern: Pattern for module names, such as `blocks.*.attn`.

    Returns:
        Names of these modules.

    Raises:
        ModelProblem: no module matches, or one that does is of another make.
    """
    found = [(name, module) for name, module in model.named_modules() if fnmatch.fnmatchcase(name, pattern)]
    found = [(name, module) for name, module in found if hasattr(module, "qkv")] or found[:1]
    if not found:
        example = next((name for name, module in model.named_modules() if hasattr(module, "qkv")), None)
        hint = f"such as {example}" if example else "no module has a fused projection named qkv"
        raise ModelProblem(f"--module-pattern {pattern}: names no module", hint=hint)
    for name, module in found:
        if is_wrapped(module):
            continue
        fused, out, heads = (getattr(module, part, None) for part in ("qkv", "proj", "num_heads"))
        fits = isinstance(fused, nn.Linear) and isinstance(out, nn.Module) and isinstance(heads, int)
        if not fits or fused.out_features != 3 * fused.in_features or fused.in_features % heads:  # type: ignore[union-attr]
            raise ModelProblem(
                f"--module-pattern {pattern}: '{name}' is no attention with a fused projection",
                why="wanted are qkv (w to 3 w features), proj and num_heads",
            )
        setattr(module, _MARK, True)
        module.forward = types.MethodType(_forward, module)
    return [name for name, _ in found]


def is_wrapped(module: nn.Module) -> bool:
    """True for modules that `wrap` changed."""
    return bool(getattr(module, _MARK, False))


def _forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Project, attend, project: [B, n, w] to [B, n, w]."""
    batch, n, width = x.shape
    q, k, v = self.qkv(x).reshape(batch, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    q = self.q_norm(q) if hasattr(self, "q_norm") else q
    k = self.k_norm(k) if hasattr(self, "k_norm") else k
    scale = getattr(self, "scale", None)
    out, _ = interface.attention(self, q, k, v, attn_mask, scaling=scale, is_causal=is_causal)
    out = out.reshape(batch, n, width)
    out = self.norm(out) if isinstance(getattr(self, "norm", None), nn.Module) else out
    out = self.proj(out)
    result: Tensor = self.proj_drop(out) if hasattr(self, "proj_drop") else out
    return result
