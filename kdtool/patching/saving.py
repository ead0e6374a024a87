"""A patched model on disk: the key `kde_attention` of config.json, and the projections beside the weights.

Plain transformers ignores both and loads the exact model; the name of the attention implementation is
never written, since plain transformers would refuse it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from kdtool.config import check_plugin_values
from kdtool.errors import ModelProblem, UsageProblem
from kdtool.patching.interface import Layer, layer_of
from kdtool.patching.layers import install, names_of
from kdtool.registry import ATTENTION

KEY = "kde_attention"
FILE = "kde_attention.safetensors"
_VERSION = 1


def layers_of(model: nn.Module) -> list[Layer]:
    """What a model's attention modules were patched with, in the order of the model."""
    return [layer for module in names_of(model).values() if (layer := layer_of(module)) is not None]


def describe(layers: Sequence[Layer], method: str, seed: int, pattern: str | None = None) -> dict[str, Any]:
    """The value of `kde_attention` in config.json."""
    patched = [layer for layer in layers if layer.reason is None]
    described: dict[str, Any] = {}
    for layer in layers:
        if layer.reason is not None:
            described[layer.name] = {"exact": layer.reason}
            continue
        entry: dict[str, Any] = {"method": layer.method, "settings": dict(layer.settings)}
        entry |= {"min_length": layer.min_length, "seed": layer.seed}
        if layer.state:
            entry["state"] = sorted(layer.state)
        described[layer.name] = entry
    return {
        "version": _VERSION,
        "method": method,
        "seed": seed,
        "min_length": min((layer.min_length for layer in patched), default=None),
        "module_pattern": pattern,
        "layers": described,
    }


def patch(model: nn.Module, layers: Sequence[Layer], method: str, seed: int = 0, pattern: str | None = None) -> None:
    """Patch a model in place, and note it in its configuration, so that saving keeps it.

    Raises:
        ModelProblem: see `install`.
    """
    install(model, layers, pattern)
    config: Any = model.config
    setattr(config, KEY, describe(layers, method, seed, pattern))


def write_state(model: nn.Module, folder: Path) -> None:
    """Write the projections of a patched model beside its weights; nothing for others."""
    tensors = {
        f"{layer.name}:{key}": tensor.detach().cpu().contiguous()
        for layer in layers_of(model)
        for key, tensor in (layer.state or {}).items()
    }
    if tensors:
        save_file(tensors, folder / FILE, metadata={"format": "pt"})


def restore(model: nn.Module, folder: Path | None, ref: str) -> bool:
    """Patch a freshly loaded model as its configuration says.

    Args:
        model: The model, as plain transformers loads it.
        folder: Where its files are.
        ref: Its name, for messages.

    Returns:
        True if it was patched; False if its configuration says nothing of that.

    Raises:
        ModelProblem: the key or the projections are damaged, or do not fit the model.
    """
    config: Any = getattr(model, "config", None)
    said = getattr(config, KEY, None)
    if said is None:
        return False
    try:
        if said["version"] != _VERSION:
            raise ModelProblem(
                f"'{ref}' was patched by another version of kdtool", why=f"{KEY} of version {said['version']!r}"
            )
        tensors = _tensors(folder, ref) if any("state" in entry for entry in said["layers"].values()) else {}
        layers = [_layer(name, entry, tensors) for name, entry in said["layers"].items()]
        pattern = said.get("module_pattern")
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelProblem(
            f"{KEY} in config.json of '{ref}' is damaged",
            why=f"{type(error).__name__}: {error}",
            hint="without that key the model is the exact one",
        ) from None
    except UsageProblem as problem:
        if isinstance(problem, ModelProblem):
            raise
        raise ModelProblem(f"{KEY} in config.json of '{ref}' is wrong", why=problem.message) from None
    install(model, layers, pattern)
    return True


def _layer(name: str, entry: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Layer:
    if "exact" in entry:
        return Layer(name, "exact", reason=str(entry["exact"]))
    plugin = ATTENTION.info(entry["method"])
    settings = check_plugin_values(plugin, entry["settings"], "settings")
    state = {key: tensors[f"{name}:{key}"] for key in entry.get("state", ())} or None
    return Layer(name, plugin.name, settings, int(entry["min_length"]), int(entry["seed"]), state)


def _tensors(folder: Path | None, ref: str) -> dict[str, torch.Tensor]:
    path = None if folder is None else folder / FILE
    if path is None or not path.is_file():
        raise ModelProblem(f"'{ref}' is incomplete", why=f"{FILE} is missing", hint="copy or download the model again")
    try:
        loaded: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise ModelProblem(f"{FILE} of '{ref}' is damaged", why=str(error)) from None
    return loaded
