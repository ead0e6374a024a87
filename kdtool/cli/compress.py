"""`kdtool compress`: make a model smaller without designing a student."""

import typer

from kdtool.cli import options as o
from kdtool.cli.launch import start
from kdtool.cli.pages import CONTEXT, Command, examples

SUMMARY = "Make a model smaller out of its own weights."
EXAMPLES = examples(
    "kdtool compress ./model --method layers -o ./smaller",
    "kdtool compress ./model --method width --set method.ffn=0.5 --data ./reviews.jsonl -o ./smaller",
    "kdtool compress ./model --method layers,low-rank --data ./reviews.jsonl --recover 500 -o ./smaller",
    "kdtool compress ./model --method width,quantize --data ./reviews.jsonl --budget parameters=0.5 -o ./smaller",
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compress", cls=Command, short_help=SUMMARY, epilog=EXAMPLES, context_settings=dict(CONTEXT))(compress)


def compress(
    ctx: typer.Context,
    model: o.ModelArgument = None,
    config: o.Config = None,
    set_: o.Set = None,
    revision: o.Revision = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    data: o.Data = None,
    task: o.Task = None,
    limit: o.Limit = None,
    benchmark: o.Benchmark = None,
    metrics: o.Metrics = None,
    compressors: o.Compressors = None,
    budget: o.Budget = None,
    recover: o.Recover = None,
    recover_method: o.RecoverMethod = None,
    batch_size: o.BatchSize = None,
    lr: o.Lr = None,
    resume: o.Resume = None,
    seed: o.Seed = None,
    output: o.Output = None,
    overwrite: o.Overwrite = None,
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
    """Make a model smaller out of its own weights, and prove what that cost."""
    start("compress", locals())
