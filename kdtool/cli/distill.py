"""`kdtool distill`: train a student to do what a teacher does."""

import typer

from kdtool.cli import options as o
from kdtool.cli.launch import start
from kdtool.cli.pages import CONTEXT, Command, examples

SUMMARY = "Train a student to do what a teacher does."
EXAMPLES = examples(
    "kdtool distill ./teacher --student layers:4 --method kd --data ./reviews.jsonl -o ./student",
    "kdtool distill owner/teacher@main --student owner/small --method kd --data owner/chats#train -o ./student",
    "kdtool distill -c recipe.yaml --max-steps 100 --fail-under accuracy.retention=0.97",
    "kdtool distill -c ./student/kdtool.json -o ./again",
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("distill", cls=Command, short_help=SUMMARY, epilog=EXAMPLES, context_settings=dict(CONTEXT))(distill)


def distill(
    ctx: typer.Context,
    teacher: o.TeacherArgument = None,
    config: o.Config = None,
    set_: o.Set = None,
    student: o.Student = None,
    revision: o.Revision = None,
    student_revision: o.StudentRevision = None,
    fine_tune_teacher: o.FineTuneTeacher = None,
    generate_with: o.GenerateWith = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    data: o.Data = None,
    task: o.Task = None,
    limit: o.Limit = None,
    benchmark: o.Benchmark = None,
    metrics: o.Metrics = None,
    temperature_scaling: o.TemperatureScaling = None,
    method: o.Method = None,
    epochs: o.Epochs = None,
    max_steps: o.MaxSteps = None,
    batch_size: o.BatchSize = None,
    grad_accum: o.GradAccum = None,
    lr: o.Lr = None,
    teacher_cache: o.TeacherCache = None,
    no_teacher_cache: o.NoTeacherCache = False,
    launcher: o.Launcher = None,
    nproc: o.Nproc = 1,
    resume: o.Resume = None,
    seed: o.Seed = None,
    output: o.Output = None,
    overwrite: o.Overwrite = None,
    save_teacher: o.SaveTeacher = None,
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
    """Train a student to do what a teacher does, and prove how well it does it."""
    start("distill", locals())
