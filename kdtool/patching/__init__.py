"""Patching of models: transformers' attention replaced by an operator of `kdtool.attention`, layer by layer."""

from kdtool.patching.interface import NAME, Layer, watching
from kdtool.patching.layers import check_called, counting, find_sites, install, names_of, parse_layers, remove
from kdtool.patching.saving import FILE, KEY, layers_of, patch, restore, write_state

__all__ = [
    "FILE",
    "KEY",
    "NAME",
    "Layer",
    "check_called",
    "counting",
    "find_sites",
    "install",
    "layers_of",
    "names_of",
    "parse_layers",
    "patch",
    "remove",
    "restore",
    "watching",
    "write_state",
]
