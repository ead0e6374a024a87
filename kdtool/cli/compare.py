"""`kdtool compare`: several methods, side by side."""

import typer

from kdtool.cli import options as o
from kdtool.cli.launch import start
from kdtool.cli.pages import CONTEXT, Command, examples

SUMMARY = "Set several methods side by side, at equal budgets."
EXAMPLES = examples(
    "kdtool compare ./teacher --student layers:3 --method none,kd --seeds 0,1,2 --data ./reviews -o ./comparison",
    "kdtool compare ./teacher --student layers:3 --method kd:temperature=1,kd:temperature=4 --data ./reviews -o ./heat",
    "kdtool compare -c recipe.yaml --method none,kd,logit-mse --set method.kd.temperature=2 -o ./comparison",
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare", cls=Command, short_help=SUMMARY, epilog=EXAMPLES, context_settings=dict(CONTEXT))(compare)


def compare(
    ctx: typer.Context,
    teacher: o.TeacherArgument = None,
    config: o.Config = None,
    set_: o.Set = None,
    student: o.Student = None,
    revision: o.Revision = None,
    student_revision: o.StudentRevision = None,
    fine_tune_teacher: o.FineTuneTeacher = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    data: o.Data = None,
    task: o.Task = None,
    limit: o.Limit = None,
    benchmark: o.Benchmark = None,
    metrics: o.Metrics = None,
    method: o.Method = None,
    epochs: o.Epochs = None,
    max_steps: o.MaxSteps = None,
    batch_size: o.BatchSize = None,
    grad_accum: o.GradAccum = None,
    lr: o.Lr = None,
    teacher_cache: o.TeacherCache = None,
    no_teacher_cache: o.NoTeacherCache = False,
    seeds: o.Seeds = None,
    output: o.Output = None,
    overwrite: o.Overwrite = None,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
    token: o.Token = None,
    offline: o.Offline = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = None,
    allow_pickle: o.AllowPickle = None,
) -> None:
    """Distil with several methods, or settings of one, and seeds at equal budgets; set the results side by side."""
    start("compare", locals())
