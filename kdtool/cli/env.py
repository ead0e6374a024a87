"""`kdtool env`: what a bug report needs to know, without secrets."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Mapping
from typing import Any

import typer

from kdtool.cli import options as o
from kdtool.cli.pages import CONTEXT, Command, examples

SUMMARY = "Print versions, machine and settings."
EXAMPLES = examples("kdtool env", "kdtool env --json")

PACKAGES = (
    "kdtool", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "huggingface-hub", "datasets",
    "pyarrow", "numpy", "pydantic", "typer", "rich", "optimum", "onnx", "onnxruntime", "matplotlib", "peft",
)  # fmt: skip
VARIABLES = (
    "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "NO_COLOR",
    "FORCE_COLOR", "TERM", "COLUMNS", "CI", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "RANK",
    "LOCAL_RANK",
)  # fmt: skip

_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|KEY|SET$")
_CREDENTIALS = re.compile(r"//[^/@\s]+@")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("env", cls=Command, short_help=SUMMARY, epilog=EXAMPLES, context_settings=dict(CONTEXT))(env)


def env(ctx: typer.Context, json: o.Json = False) -> None:
    """Print versions, machine and settings, ready to paste into a bug report."""
    console = ctx.obj.settle(json=json, quiet=False)
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": cpu_count(),
        "memory_bytes": memory_bytes(),
        "devices": devices(),
        "packages": versions(),
        "environment": variables(os.environ),
    }
    if console.mode == "json":
        console.answer({"command": "env", **facts})
        return
    lines = [
        f"Python: {facts['python']}",
        f"Platform: {facts['platform']}",
        f"CPUs: {facts['cpus']}",
        f"Memory: {_gigabytes(memory_bytes())}",
        f"Devices: {', '.join(devices()) or 'unknown: torch cannot be imported'}",
    ]
    for title, table in (("Packages", versions()), ("Environment", variables(os.environ))):
        lines += ["", f"{title}:", *(f"  {name}: {value}" for name, value in table.items())]
    console.print("\n".join(lines))


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Physical memory, or None where the system does not say."""
    if sys.platform == "win32":
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions() -> dict[str, str]:
    """Versions of the packages that matter, without importing them."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def devices() -> list[str]:
    """Devices that torch sees; empty when torch is missing or broken."""
    if importlib.util.find_spec("torch") is None:
        return []
    try:
        import torch
    except (ImportError, OSError):
        return []
    cards = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    return ["cpu", *cards, *(["mps"] if torch.backends.mps.is_available() else [])]


def variables(environ: Mapping[str, Any]) -> dict[str, str]:
    """Variables that are set; of secrets only that they are."""
    known = [*VARIABLES, *sorted(name for name in environ if name.startswith("KDTOOL_"))]
    return {
        name: "(set)" if _SECRET.search(name) else _CREDENTIALS.sub("//***@", str(environ[name]))
        for name in known
        if name in environ
    }


def _gigabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"
