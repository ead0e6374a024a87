"""kdtool makes pretrained models smaller and faster, and proves what that cost."""

from typing import Any

from kdtool import _autoload

__version__ = "0.1.0.dev0"

__all__ = ["__version__", "compare", "compress", "distill", "evaluate", "export", "load", "patch_attention"]

_HOME = {
    "compare": "kdtool.pipelines",
    "compress": "kdtool.pipelines",
    "distill": "kdtool.pipelines",
    "evaluate": "kdtool.pipelines",
    "export": "kdtool.pipelines",
    "load": "kdtool.models",
    "patch_attention": "kdtool.pipelines",
}


def __getattr__(name: str) -> Any:
    """Import public functions on first use, so that `import kdtool` stays light."""
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'kdtool' has no attribute '{name}'")


_autoload.install()


def __dir__() -> list[str]:
    """Name the public functions also before their first use."""
    return sorted({*globals(), *__all__})
