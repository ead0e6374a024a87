"""`kdtool evaluate`: score a model, alone or beside its teacher."""

import typer

from kdtool.cli import options as o
from kdtool.cli.launch import start
from kdtool.cli.pages import CONTEXT, Command, examples

SUMMARY = "Score a model, alone or beside its teacher."
EXAMPLES = examples(
    "kdtool evaluate ./student --data ./reviews.jsonl --metrics accuracy,ece",
    "kdtool evaluate ./student --teacher ./teacher --data ./reviews.jsonl --fail-under accuracy.retention=0.97",
    "kdtool evaluate owner/model --data owner/set#test --json > result.json",
    "kdtool evaluate ./patched --teacher ./exact --data ./reviews.jsonl --lengths 512,2048,8192",
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate", cls=Command, short_help=SUMMARY, epilog=EXAMPLES, context_settings=dict(CONTEXT))(evaluate)


def evaluate(
    ctx: typer.Context,
    model: o.ModelArgument = None,
    config: o.Config = None,
    set_: o.Set = None,
    teacher: o.Teacher = None,
    revision: o.Revision = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    data: o.Data = None,
    benchmark: o.Benchmark = None,
    task: o.Task = None,
    metrics: o.Metrics = None,
    temperature_scaling: o.TemperatureScaling = None,
    limit: o.Limit = None,
    lengths: o.Lengths = None,
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
    """Score a model on data or a named benchmark, alone or beside its teacher."""
    start("evaluate", locals())
