"""The stages as plain functions: what the command line and the Python API both call."""

from kdtool.pipelines.compare import compare
from kdtool.pipelines.compress import compress
from kdtool.pipelines.distill import distill
from kdtool.pipelines.evaluate import evaluate
from kdtool.pipelines.export import export
from kdtool.pipelines.patch_attention import patch_attention
from kdtool.pipelines.plan import plan
from kdtool.pipelines.quickstart import quickstart

__all__ = ["compare", "compress", "distill", "evaluate", "export", "patch_attention", "plan", "quickstart"]
