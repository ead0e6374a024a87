"""`kdtool patch-attention`: replace attention by an operator whose time does not grow with the square of the length."""

import typer

from kdtool.cli import options as o
from kdtool.cli.launch import start
from kdtool.cli.pages import CONTEXT, Command, examples

SUMMARY = "Replace a model's attention by a faster, approximate one."
EXAMPLES = examples(
    "kdtool patch-attention ./model --data ./reviews.jsonl --lengths 2048,8192 -o ./patched",
    "kdtool patch-attention ./model --layers 0-3,7 --max-error 0.05 --max-drop accuracy=0.005 --data ./x.jsonl -o ./y",
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    add = app.command(
        "patch-attention", cls=Command, short_help=SUMMARY, epilog=EXAMPLES, context_settings=dict(CONTEXT)
    )
    add(patch_attention)


def patch_attention(
    ctx: typer.Context,
    model: o.ModelArgument = None,
    config: o.Config = None,
    set_: o.Set = None,
    revision: o.Revision = None,
    module_pattern: o.ModulePattern = None,
    device: o.Device = None,
    data: o.Data = None,
    benchmark: o.Benchmark = None,
    calibrate: o.Calibrate = None,
    task: o.Task = None,
    metrics: o.Metrics = None,
    limit: o.Limit = None,
    method: o.AttentionMethod = None,
    layers: o.Layers = None,
    max_error: o.MaxError = None,
    lengths: o.Lengths = None,
    seed: o.Seed = None,
    output: o.Output = None,
    overwrite: o.Overwrite = None,
    max_drop: o.MaxDrop = None,
    fail_under: o.FailUnder = None,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
    push: o.Push = None,
    private: o.Private = None,
    create_pr: o.CreatePr = None,
    commit_message: o.CommitMessage = None,
    token: o.Token = None,
    offline: o.Offline = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = None,
    allow_pickle: o.AllowPickle = None,
) -> None:
    """Replace attention layer by layer, where it stays accurate and gets faster, and prove it."""
    start("patch-attention", locals())
