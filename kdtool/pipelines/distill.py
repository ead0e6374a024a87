"""`distill`: teacher and data in; verified, documented student out."""

import contextlib
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdtool import lora
from kdtool.card import write_card
from kdtool.data.examples import DataSplits, Examples
from kdtool.errors import DataProblem, QualityProblem, UsageProblem
from kdtool.methods._base import Method
from kdtool.models import Loaded, load
from kdtool.pipelines import setup
from kdtool.pipelines.asking import check_scores, learns_from_scores
from kdtool.pipelines.caching import attach_cache, temperature_of
from kdtool.pipelines.finished import read_proof
from kdtool.pipelines.measured import check_metrics
from kdtool.pipelines.output import KEPT_TEACHER, Output
from kdtool.pipelines.prepare import check_teacher, prepared
from kdtool.pipelines.prove import compare
from kdtool.pipelines.push import check_push, push
from kdtool.pipelines.teacher import fine_tuned
from kdtool.proof import Proof, Result
from kdtool.registry import METHODS, check_fit
from kdtool.report import write_manifest, write_report
from kdtool.run import Run
from kdtool.saving import save_model
from kdtool.sections import RunConfig
from kdtool.tasks._base import TEACHER_PREFIX, Task
from kdtool.tasks._views import PIXELS, ImageViews, Views
from kdtool.train import parallel
from kdtool.train.loop import History, Trainer
from kdtool.train.rehearsal import rehearse
from kdtool.train.state import seed_everything
from kdtool.verify import reload_check
from kdtool.writing import typed

_PROBE_ROWS = 8


@dataclass(slots=True)
class Ready:
    """Everything training needs."""

    task: Task
    data: DataSplits
    encoded: setup.Encoded
    teacher: Loaded | None
    student: Loaded
    method: Any
    views: Views | None = None


def get_ready(config: RunConfig, run: Run, work: Path | None = None) -> Ready:
    """Load data and models, check that they fit, build the method, and let it make its data.

    Args:
        config: The run's configuration.
        run: Context.
        work: Folder for what methods make before they train (default: a temporary one).

    Raises:
        KdtoolError: anything that does not fit, before any work is done.
    """
    setup.apply_benchmark(config)
    setup.apply_method(config)
    check_teacher(config)
    task = setup.pick_task(config, setup.first_model(config), run)
    check_metrics(config, task)
    facts = METHODS.info(config.method_name).facts
    check_fit(config.method_name, task.name)
    loads_teacher = facts.get("loads_teacher", True) and not config.teacher.writes_only
    keeps = facts.get("trains_teacher") or not facts.get("loads_teacher", True)
    if config.output.save_teacher and not (keeps and config.teacher.model):
        raise UsageProblem(
            f"--save-teacher: method {config.method_name} trains no teacher", hint="bd-kd, dml and kdcl train theirs"
        )
    data = setup.get_data(config, task, run)
    if data.train is None:
        raise DataProblem("the data has no rows to train on", hint="name their split: --set data.train_split=NAME")
    teacher = None
    if config.teacher.model is not None and loads_teacher:
        teacher = setup.load_teacher(config, task, data, run)
        setup.relabel(data, teacher, config, run)
        if config.teacher.fine_tune:
            teacher = fine_tuned(config, task, teacher, data, run)
        elif facts.get("teachers", (1, 1))[0] > 0 and not facts.get("trains_teacher"):
            setup.check_trained(teacher)
    seed_everything(run.seed)
    student = setup.load_student(config, task, data, teacher, run)
    if teacher is not None and teacher.facts.get("new_weights") and not facts.get("trains_teacher"):
        teacher = None  # an untrained teacher is only a source of layers; comparing with it says nothing
    config.train.lr = config.train.lr or task.default_lr
    settings = METHODS.build_config(config.method_name, config.method_values)
    method = METHODS.get(config.method_name)(settings, student, [teacher] if teacher else [], task)
    if type(method).prepare is not Method.prepare:
        with contextlib.ExitStack() as stack:
            folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            data = prepared(method, task, data, config, run, folder)
        teacher = method.teacher_list[0] if method.teacher_list else teacher
    if config.teacher.cache is not None:
        temperature_of(method, config, "teacher.cache")
    elif learns_from_scores(config):
        check_scores(task.name, temperature_of(method, config, "an endpoint as the teacher"))
    encoded = setup.encode(task, data, student, teacher, config, run)
    encoded.train = packed(config, task, method, encoded.train)
    views = make_views(config, task, encoded.train, student, teacher)
    if (config.augment.mixup or config.augment.cutmix) and not method.mixes:
        raise UsageProblem(
            f"method {config.method_name} cannot take the mixed labels of augment.mixup and augment.cutmix",
            why="it asks which class a row has",
            hint=f"those that can: {', '.join(n for n in METHODS.names() if METHODS.info(n).facts.get('mixes'))}",
        )
    return Ready(task, data, encoded, teacher, student, method, views)


def packed(config: RunConfig, task: Task, method: Any, rows: Examples | None) -> Examples | None:
    """Training rows that share a line with others, where the method, the task and the models can have it so.

    Raises:
        UsageProblem: it was asked for, and one of them cannot.
    """
    wanted = config.data.packing
    if rows is None or wanted is False or not (method.packs or wanted):
        return rows
    if not method.packs:
        raise UsageProblem(
            f"data.packing: method {config.method_name} needs every example in a row of its own",
            hint="leave data.packing out",
        )
    made = task.packed(rows, [method.student, *(teacher.model for teacher in method.teacher_list)])
    if made is None and wanted:
        raise UsageProblem(
            "data.packing: the rows cannot be packed",
            why=f"{task.name} has none that could, or a model does not keep examples apart by their positions",
            hint="leave data.packing out",
        )
    return rows if made is None else made


def make_views(
    config: RunConfig, task: Task, rows: Examples | None, student: Loaded, teacher: Loaded | None
) -> Views | None:
    """What alters the training rows; None where nothing does.

    Raises:
        UsageProblem: the rows are no images, or an extra is missing.
    """
    if not config.augment.active or rows is None:
        found: Views | None = None if rows is None else task.views(rows, config.augment)
        return found
    if task.name != "image-classification":
        raise UsageProblem(f"augment.* alters images, and {task.name} has none", hint="leave the section out")
    processors = {"": student.processor}
    other = f"{TEACHER_PREFIX}0."
    if teacher is not None and other + PIXELS in rows.columns:
        processors[other] = teacher.processor
    return ImageViews(task, rows, config.augment, processors, len(student.labels or []))


def train(ready: Ready, config: RunConfig, run: Run, output: Output) -> History:
    """Train the student of `ready`, from the last checkpoint if there is one; it holds the result then."""
    ready.method.folder, ready.method.held_out = output.kept, ready.encoded.validation
    trainer = Trainer(
        ready.method,
        ready.encoded.train,  # type: ignore[arg-type] # get_ready refuses data without training rows
        config.train,
        run,
        setup.is_head_of(ready.student.model),
        output.checkpoints,
        ready.views,
    )
    attach_cache(trainer, ready.teacher, config, run, output.work / "teacher-cache")
    rehearse(trainer)
    run.reporter.info(
        f"training {ready.student.parameters:,} parameters for {trainer.plan.steps} steps ({config.method_name})"
    )
    history = trainer.train()
    student = ready.student
    student.model = parallel.gathered(ready.method.finish())
    if config.student.lora_adapter and run.rank == 0:
        lora.save_adapter(student.model, student.ref, student.revision, output.kept / lora.ADAPTER)
    lora.merge(student.model)
    return history


def distill(config: RunConfig, run: Run | None = None) -> Result:
    """Train a student to do what a teacher does, prove how well it does it, and save it.

    Args:
        config: The run's configuration, from `kdtool.config.load_config`.
        run: Context (default: made from the configuration, silent).

    Returns:
        What was made and measured; `gates_missed` names gates that did not pass.

    Raises:
        KdtoolError: its children say what went wrong; the output folder is left as it was, or
            holds checkpoints from which the same command goes on.
    """
    began = time.perf_counter()
    run = run or setup.make_run(config)
    asked = config.model_copy(deep=True)
    if config.output.folder is None:
        raise UsageProblem("no output folder given", hint="add -o FOLDER")
    check_push(config, run)
    setup.begin(config, run)
    with parallel.first_alone(run):
        output = Output(Path(config.output.folder).expanduser(), asked, run.rank == 0)
    if parallel.gather_objects(run, output.complete)[0]:
        parallel.leave(run)
        run.reporter.info(f"{output.folder} lacked only its last files; they are in place now")
        return _conclude(config, run, output.folder, None, began)
    try:
        ready = get_ready(config, run, output.work)
        history = train(ready, config, run, output)
        proof = _finish(ready, history, config, run, output, began) if run.rank == 0 else None
        parallel.wait(run)
    except BaseException:
        output.release()
        raise
    finally:
        parallel.leave(run)
    return _conclude(config, run, output.folder, (proof, history, ready.task.name), began)


def _conclude(
    config: RunConfig, run: Run, folder: Path, made: tuple[Proof | None, History, str] | None, began: float
) -> Result:
    """Publish if asked to, and say how it went; without `made` the folder's manifest tells.

    Raises:
        QualityProblem: the saved model does not reproduce its outputs.
    """
    proof: Proof | None
    if made is None:
        proof, manifest = read_proof(folder)
        history, task = History(steps=manifest["steps"]), str(manifest["task"])
    else:
        proof, history, task = made
    rate = round(history.samples / history.seconds, 1) if history.seconds else None
    extra = {"task": task, "method": config.method_name, "samples_per_second": rate}
    extra["next"] = f"kdtool export {folder} --format safetensors --set output.dtype=float16 -o {folder}-fp16"
    result = Result("distill", folder, proof, time.perf_counter() - began, history.steps, extra)
    if proof is None:
        return result  # the first process says it
    if config.output.push is not None:
        result.extra["push"] = push(config, run, folder, proof)
    if not proof.reload.get("passed", True):
        raise QualityProblem(
            f"the student in {folder} does not reproduce its outputs after reloading",
            why=f"largest difference {proof.reload['max_abs_diff']:.2e}",
        )
    return result


def _finish(ready: Ready, history: History, config: RunConfig, run: Run, output: Output, began: float) -> Proof:
    """Save, reload, measure, document, and move everything into place."""
    task, staging = ready.task, output.staging
    student = ready.student
    save_model(student, staging, config.output)
    if output.kept.is_dir():
        shutil.copytree(output.kept, staging, dirs_exist_ok=True)
    if config.output.save_teacher and ready.teacher is not None:
        save_model(ready.teacher, staging / KEPT_TEACHER, config.output)
    probe = task.example_inputs(ready.encoded.test, min(_PROBE_ROWS, len(ready.encoded.test)))
    reload: dict[str, Any] = {}
    if config.eval.reload:
        run.reporter.info("reloading the student in a fresh process")
        reload = reload_check(staging, task, student.model, probe, run.trust_remote_code)
    model = load(staging, task.name, run).float()
    saved = Loaded(model, student.processor, str(output.folder), None, staging, student.facts)
    proof = compare(task, saved, ready.teacher, ready.encoded.test, config, run, ready.encoded.validation)
    proof.reload = reload
    rows = [
        {
            "step": row["step"],
            "loss": row["loss"],
            "lr": row["lr"],
            "parts": {k: v for k, v in row.items() if k not in ("step", "loss", "lr")},
        }
        for row in history.rows
    ]
    write_report(staging, proof, rows, config, config.output.plots)
    facts = {"task": task.name, "labels": ready.data.labels, "command_line": run.provenance.get("command", "")}
    write_card(staging, proof, config, facts)
    extra = {
        "seconds": time.perf_counter() - began,
        "train_seconds": history.seconds,
        "steps": history.steps,
        "history": rows,
        "task": task.name,
    }
    write_manifest(
        staging, config, proof, run, typed(run.provenance.get("command") or "kdtool distill -c kdtool.json"), extra
    )
    output.commit()
    return proof
