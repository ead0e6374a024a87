"""kdtool makes pretrained models smaller and faster, and proves what that cost."""

from typing import Any

__version__ = "0.1.0.dev0"

__all__ = ["__version__", "distill", "evaluate", "export", "load"]

_HOME = {
    "distill": "kdtool.pipelines",
    "evaluate": "kdtool.pipelines",
    "export": "kdtool.pipelines",
    "load": "kdtool.models",
}


def __getattr__(name: str) -> Any:
    """Import public functions on first use, so that `import kdtool` stays light."""
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'kdtool' has no attribute '{name}'")
