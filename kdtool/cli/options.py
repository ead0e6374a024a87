"""Every option of the command line, declared once, and the configuration key it sets.

Defaults are None throughout: only what was given on the command line or in the environment
overrides a configuration file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kdtool.cli import complete

MODEL = "Model"
DATA = "Data"
METHOD = "Method"
OPTIMISATION = "Optimisation"
OUTPUT = "Output"
HUB = "Hub"
DANGEROUS = "Dangerous"


def _option(*flags: str, panel: str | None, text: str, **more: Any) -> Any:
    """A typer option that is also read from KDTOOL_<OPTION>."""
    name = next(flag for flag in flags if flag.startswith("--")).split("/")[0].removeprefix("--")
    envvar = "KDTOOL_" + name.replace("-", "_").upper()
    return typer.Option(*flags, rich_help_panel=panel, help=text, envvar=envvar, show_envvar=False, **more)


# Arguments
TeacherArgument = Annotated[
    str | None,
    typer.Argument(metavar="TEACHER", help="Model to learn from: folder, or Hub id with optional @revision."),
]
ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Folder, or Hub id with optional @revision.")
]

# Configuration
Config = Annotated[
    Path | None,
    _option("--config", "-c", panel=None, text="YAML or JSON file, or the kdtool.json of a run.", metavar="FILE"),
]
Set = Annotated[
    list[str] | None,
    _option("--set", panel=None, text="Set any key, such as method.temperature=2. Repeatable.", metavar="KEY=VALUE"),
]

# Model
Student = Annotated[
    str | None,
    _option(
        "--student",
        panel=MODEL,
        text="Model to train: folder, Hub id, config file (random weights), layers:N or layers:0,3,5.",
        metavar="MODEL",
    ),
]
Teacher = Annotated[
    str | None, _option("--teacher", panel=MODEL, text="Second model, to compare with.", metavar="MODEL")
]
Revision = Annotated[
    str | None,
    _option("--revision", panel=MODEL, text="Branch, tag or commit of the model named first.", metavar="REV"),
]
StudentRevision = Annotated[
    str | None, _option("--student-revision", panel=MODEL, text="Branch, tag or commit of the student.", metavar="REV")
]
FineTuneTeacher = Annotated[
    bool | None, _option("--fine-tune-teacher", panel=MODEL, text="Fine-tune the teacher on the data first.")
]
GenerateWith = Annotated[
    Literal["transformers", "vllm"] | None,
    _option("--generate-with", panel=MODEL, text="Who writes texts of a local teacher (default transformers)."),
]
Device = Annotated[
    str | None,
    _option(
        "--device",
        panel=MODEL,
        text="auto, cpu, cuda, cuda:N or mps.",
        metavar="DEVICE",
        autocompletion=complete.devices,
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"] | None,
    _option("--dtype", panel=MODEL, text="Number format of computation."),
]

# Data
Data = Annotated[
    str | None,
    _option(
        "--data",
        "-d",
        panel=DATA,
        text="Hub id with optional :config, @revision, #split; folder; parquet, jsonl or csv file; or a shipped set.",
        metavar="DATA",
    ),
]
Task = Annotated[
    str | None,
    _option(
        "--task",
        panel=DATA,
        text="Task; guessed where possible.",
        metavar="TASK",
        autocompletion=complete.names("tasks"),
    ),
]
Limit = Annotated[
    int | None,
    _option(
        "--limit", panel=DATA, text="Use at most N rows: of training, or of the test for evaluate.", metavar="N", min=1
    ),
]

# Method
Method = Annotated[
    str | None,
    _option(
        "--method",
        panel=METHOD,
        text="Distillation method; see: kdtool methods ls.",
        metavar="NAME",
        autocompletion=complete.names("methods"),
    ),
]

AttentionMethod = Annotated[
    str | None,
    _option(
        "--method",
        panel=METHOD,
        text="Attention operator (default cluster); see: kdtool methods ls.",
        metavar="NAME",
        autocompletion=complete.names("attention"),
    ),
]
Layers = Annotated[
    str | None, _option("--layers", panel=METHOD, text="Attention layers to patch (default all).", metavar="0-3,7")
]
Calibrate = Annotated[
    str | None,
    _option("--calibrate", panel=DATA, text="Data to choose settings on (default: training rows).", metavar="DATA"),
]
MaxError = Annotated[
    float | None,
    _option("--max-error", panel=METHOD, text="Largest relative error of a head (default 0.1).", metavar="X"),
]
Lengths = Annotated[
    str | None,
    _option(
        "--lengths",
        panel=DATA,
        text="Tokens of the inputs to measure at (patch-attention: default 512,2048; evaluate: time and memory).",
        metavar="N,N,...",
    ),
]
MaxDrop = Annotated[
    list[str] | None,
    _option("--max-drop", panel=OUTPUT, text="Exit 3 if a metric drops by more. Repeatable.", metavar="METRIC=VALUE"),
]
ModulePattern = Annotated[
    str | None,
    _option("--module-pattern", panel=MODEL, text="Modules with a projection qkv to take in.", metavar="PATTERN"),
]
Compressors = Annotated[
    str | None,
    _option(
        "--method",
        panel=METHOD,
        text="Compressor, or several in order, separated by commas; see: kdtool methods ls.",
        metavar="NAME[,NAME]",
        autocompletion=complete.names("compressors"),
    ),
]
Recover = Annotated[
    int | None,
    _option("--recover", panel=METHOD, text="Distil the result back from MODEL for N steps.", metavar="N", min=1),
]
RecoverMethod = Annotated[
    str | None,
    _option(
        "--recover-method",
        panel=METHOD,
        text="Distillation method of --recover (default kd).",
        metavar="NAME",
        autocompletion=complete.names("methods"),
    ),
]
Budget = Annotated[
    str | None,
    _option(
        "--budget",
        panel=METHOD,
        text="Search settings that leave a share of parameters, bytes or latency.",
        metavar="parameters=0.5",
    ),
]

# Optimisation
Epochs = Annotated[float | None, _option("--epochs", panel=OPTIMISATION, text="Passes over the data.", metavar="X")]
MaxSteps = Annotated[
    int | None,
    _option("--max-steps", panel=OPTIMISATION, text="Optimiser steps; wins over --epochs.", metavar="N", min=1),
]
BatchSize = Annotated[
    int | None, _option("--batch-size", panel=OPTIMISATION, text="Examples in one forward pass.", metavar="N", min=1)
]
GradAccum = Annotated[
    int | None, _option("--grad-accum", panel=OPTIMISATION, text="Forward passes in one step.", metavar="N", min=1)
]
Lr = Annotated[float | None, _option("--lr", panel=OPTIMISATION, text="Peak learning rate.", metavar="X")]
Resume = Annotated[
    bool | None,
    _option(
        "--resume/--no-resume", panel=OPTIMISATION, text="Go on with the unfinished run in the output folder (default)."
    ),
]
Seed = Annotated[
    int | None,
    _option("--seed", panel=OPTIMISATION, text="Seed of all random generators (default 0).", metavar="N", min=0),
]

Launcher = Annotated[
    Literal["torchrun"] | None,
    _option("--launcher", panel=OPTIMISATION, text="Start several processes of this command through torchrun."),
]
Nproc = Annotated[
    int, _option("--nproc", panel=OPTIMISATION, text="Processes that --launcher starts.", metavar="N", min=1)
]
TeacherCache = Annotated[
    str | None,
    _option("--teacher-cache", panel=OPTIMISATION, text="Folder of teacher outputs to fill and share.", metavar="DIR"),
]
NoTeacherCache = Annotated[
    bool, _option("--no-teacher-cache", panel=OPTIMISATION, text="Run the teacher on every batch.")
]
Seeds = Annotated[
    str | None,
    _option("--seeds", panel=OPTIMISATION, text="Seeds to run each method with (default 0,1,2).", metavar="N,N,..."),
]

# Proof and output
Benchmark = Annotated[
    str | None,
    _option(
        "--benchmark",
        panel=DATA,
        text="Named benchmark: data, columns and metrics in one word; or lm-eval:TASK.",
        metavar="NAME",
        autocompletion=complete.benchmarks,
    ),
]
Metrics = Annotated[str | None, _option("--metrics", panel=DATA, text="Metrics, separated by commas.", metavar="NAMES")]
TemperatureScaling = Annotated[
    Literal["val", "off"] | None,
    _option(
        "--temperature-scaling",
        panel=DATA,
        text="Fit a temperature on validation rows and show calibration after it (default val, where there are any).",
    ),
]
FailUnder = Annotated[
    list[str] | None,
    _option(
        "--fail-under",
        panel=OUTPUT,
        text="Exit 3 below accuracy=0.85, or accuracy.retention=0.97 of the teacher. Repeatable.",
        metavar="METRIC=VALUE",
    ),
]
Output = Annotated[Path | None, _option("--output", "-o", panel=OUTPUT, text="Output folder.", metavar="FOLDER")]
Overwrite = Annotated[
    bool | None, _option("--overwrite", panel=OUTPUT, text="Replace what a non-empty output folder holds.")
]
SaveTeacher = Annotated[
    bool | None,
    _option("--save-teacher", panel=OUTPUT, text="Keep the teacher that an online method trained, in FOLDER/teacher."),
]
Format = Annotated[
    str | None,
    _option(
        "--format",
        panel=OUTPUT,
        text="Target format (default safetensors).",
        metavar="NAME",
        autocompletion=complete.names("exporters"),
    ),
]
DryRun = Annotated[bool, _option("--dry-run", panel=OUTPUT, text="Print the resolved plan and stop.")]
Json = Annotated[bool, _option("--json", panel=OUTPUT, text="Print exactly one JSON object.")]
Quiet = Annotated[bool, _option("--quiet", "-q", panel=OUTPUT, text="Print only the result path or main number.")]
Verbose = Annotated[
    int,
    _option("--verbose", "-v", panel=OUTPUT, text="Say more; -vv shows tracebacks.", count=True, show_default=False),
]

# Hub
Push = Annotated[str | None, _option("--push", panel=HUB, text="Publish to this Hub repository.", metavar="REPO_ID")]
Private = Annotated[
    bool | None, _option("--private/--no-private", panel=HUB, text="Create that repository private or public.")
]
CreatePr = Annotated[bool | None, _option("--create-pr", panel=HUB, text="Publish as a pull request.")]
CommitMessage = Annotated[
    str | None, _option("--commit-message", panel=HUB, text="Message of the published commit.", metavar="TEXT")
]
Token = Annotated[
    str | None,
    _option("--token", panel=HUB, text="Hub token (default: HF_TOKEN or the stored login).", metavar="TOKEN"),
]
Offline = Annotated[bool | None, _option("--offline", panel=HUB, text="Never ask the network.")]
CacheDir = Annotated[
    Path | None, _option("--cache-dir", panel=HUB, text="Hub cache folder (default: HF_HOME).", metavar="FOLDER")
]

# Dangerous
TrustRemoteCode = Annotated[
    bool | None, _option("--trust-remote-code", panel=DANGEROUS, text="Run code that a model repository brings.")
]
AllowPickle = Annotated[
    bool | None, _option("--allow-pickle", panel=DANGEROUS, text="Load pickle checkpoints, weights only.")
]

KEYS: Mapping[str, str] = {
    "teacher": "teacher.model",
    "fine_tune_teacher": "teacher.fine_tune",
    "generate_with": "teacher.generate_with",
    "student": "student.model",
    "data": "data.source",
    "task": "data.task",
    "limit": "data.limit",
    "method": "method.name",
    "recover": "recover.steps",
    "recover_method": "recover.method",
    "budget": "search.budget",
    "epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "batch_size": "train.batch_size",
    "grad_accum": "train.grad_accum",
    "lr": "train.lr",
    "resume": "train.resume",
    "teacher_cache": "train.teacher_cache_dir",
    "layers": "patch.layers",
    "calibrate": "patch.calibrate",
    "max_error": "patch.max_error",
    "lengths": "patch.lengths",
    "max_drop": "patch.max_drop",
    "module_pattern": "patch.module_pattern",
    "benchmark": "eval.benchmark",
    "metrics": "eval.metrics",
    "temperature_scaling": "eval.temperature_scaling",
    "fail_under": "eval.fail_under",
    "seeds": "eval.seeds",
    "output": "output.folder",
    "overwrite": "output.overwrite",
    "save_teacher": "output.save_teacher",
    "format": "output.format",
    "push": "output.push",
    "private": "output.private",
    "create_pr": "output.create_pr",
    "commit_message": "output.commit_message",
    "seed": "runtime.seed",
    "device": "runtime.device",
    "dtype": "runtime.dtype",
    "offline": "runtime.offline",
    "cache_dir": "runtime.cache_dir",
    "trust_remote_code": "runtime.trust_remote_code",
    "allow_pickle": "runtime.allow_pickle",
}
"""Parameter name of an option to the configuration key it sets."""

COMMAND_KEYS: Mapping[str, Mapping[str, str]] = {
    "distill": {},
    "compare": {},
    "compress": {"model": "teacher.model", "compressors": "method.name"},
    "evaluate": {"model": "student.model", "limit": "data.test_limit", "lengths": "eval.lengths"},
    "export": {"model": "teacher.model"},
    "patch-attention": {"model": "teacher.model", "limit": "data.test_limit"},
}
"""What differs by subcommand: evaluate has no training rows to limit, and its model may have a teacher."""

FIRST_MODEL: Mapping[str, str] = {
    "distill": "teacher.model",
    "compare": "teacher.model",
    "compress": "teacher.model",
    "evaluate": "student.model",
    "export": "teacher.model",
    "patch-attention": "teacher.model",
}
"""Subcommand to the key that its first argument sets, and that --revision is for."""
