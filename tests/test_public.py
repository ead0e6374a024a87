"""The public surface, and what importing it costs."""

import subprocess
import sys

import kdtool


def test_exported_names():
    assert sorted(kdtool.__all__) == [
        "__version__",
        "compare",
        "compress",
        "distill",
        "evaluate",
        "export",
        "load",
        "patch_attention",
    ]
    for name in kdtool.__all__:
        assert getattr(kdtool, name) is not None


def test_import_is_light():
    code = "import sys, kdtool; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
