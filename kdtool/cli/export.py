"""`kdtool export`: write a model in another format, and check that it still says the same."""

import typer

from kdtool.cli import options as o
from kdtool.cli.launch import start
from kdtool.cli.pages import CONTEXT, Command, examples

SUMMARY = "Write a model in another format."
EXAMPLES = examples(
    "kdtool export ./student --format onnx -o ./student-onnx",
    "kdtool export owner/model@main --format safetensors --set output.dtype=bfloat16 -o ./half",
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export", cls=Command, short_help=SUMMARY, epilog=EXAMPLES, context_settings=dict(CONTEXT))(export)


def export(
    ctx: typer.Context,
    model: o.ModelArgument = None,
    config: o.Config = None,
    set_: o.Set = None,
    revision: o.Revision = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    data: o.Data = None,
    task: o.Task = None,
    seed: o.Seed = None,
    format: o.Format = None,  # noqa: A002 - the name of the option
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
    """Write a model in another format, and check that it still gives the same outputs."""
    start("export", locals())
