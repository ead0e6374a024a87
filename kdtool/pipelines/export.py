"""`export`: a model in another format, checked against the source."""

import time
from pathlib import Path

from kdtool.card import write_card
from kdtool.errors import QualityProblem, UsageProblem
from kdtool.exporters._base import ExportReport
from kdtool.models import Loaded, load_model
from kdtool.patching.fixed import check_exportable, patched_layers
from kdtool.pipelines import setup
from kdtool.pipelines.output import Output
from kdtool.pipelines.probe import probe_batches
from kdtool.pipelines.prove import weight_bytes
from kdtool.pipelines.push import check_push, push
from kdtool.pipelines.streamed import run_streamed, wanted
from kdtool.proof import Proof, Result, Side
from kdtool.registry import EXPORTERS
from kdtool.report import write_manifest, write_report
from kdtool.run import Run
from kdtool.sections import RunConfig
from kdtool.tasks._base import Task
from kdtool.tasks._text import positions


def export(config: RunConfig, run: Run | None = None) -> Result:
    """Write a model in another format, and prove that it computes what the source computes.

    Args:
        config: `teacher.model` is the model, `output.format` the format.
        run: Context (default: made from the configuration, silent).

    Raises:
        QualityProblem: the exported model differs from the source; it is kept, graphs under another name.
        KdtoolError: its other children say what went wrong.
    """
    began = time.perf_counter()
    run = run or setup.make_run(config)
    setup.begin(config, run)
    if config.teacher.model is None or config.output.folder is None:
        raise UsageProblem("export needs a model and an output folder", hint="kdtool export MODEL -o FOLDER")
    check_push(config, run)
    exporter = EXPORTERS.get(config.output.format)
    asked = config.model_copy(deep=True)
    output = Output(Path(config.output.folder).expanduser(), asked)
    try:
        if wanted(config, run):
            return _streamed(config, run, output, began)
        task = setup.pick_task(config, config.teacher.model, run)
        loaded = load_model(config.teacher.model, task.auto_class, run, "model")
        setup.check_trained(loaded, "model")
        setup.load_processor(loaded, task, run)
        parameters, source_bytes, name = loaded.parameters, weight_bytes(loaded.folder), loaded.ref
        length = _fixed_length(config, task, loaded)
        probes = probe_batches(task, loaded, config, run, length)
        run.reporter.info(f"exporting to {config.output.format}, to be checked on {len(probes)} batches")
        report: ExportReport = exporter(loaded, task, probes, output.staging, config, run)
        files = _set_aside(output.staging, report)
        made = Side(str(output.folder), None, parameters, weight_bytes(output.staging), {})
        source = Side(name, loaded.revision, parameters, source_bytes, {})
        proof = Proof(made, source, reload=report.parity)
        write_report(output.staging, proof, [], config, plots=False)
        facts = {"task": task.name, "labels": loaded.labels, "use": report.use}
        if report.use is not None:
            facts |= {"library_name": config.output.format, "tags": [config.output.format]}
        write_card(output.staging, proof, config, facts)
        extra = {
            "seconds": time.perf_counter() - began,
            "task": task.name,
            "format": config.output.format,
            "dtype": report.dtype,
            **report.facts,
        }
        write_manifest(output.staging, config, proof, run, run.provenance.get("command", ""), extra)
        output.commit()
    except BaseException:
        output.release()
        raise
    published = push(config, run, output.folder, proof)
    if not report.parity["passed"]:
        raise QualityProblem(
            f"the model exported to {output.folder} differs from its source",
            why=report.parity.get("why")
            or f"largest difference {report.parity['max_abs_diff']:.2e}, allowed {report.parity['tolerance']:.2e}",
            hint=f"set aside as {report.graph}.failed" if report.graph else None,
        )
    extra = {"format": config.output.format, "dtype": report.dtype, "files": files, "task": task.name}
    if config.output.push is not None:
        extra["push"] = published
    if report.scored:
        extra["next"] = f"kdtool evaluate {output.folder} --data {config.data.source or 'DATA'}"
    return Result("export", output.folder, proof, time.perf_counter() - began, None, extra)


def _streamed(config: RunConfig, run: Run, output: Output, began: float) -> Result:
    """The result of an export weight by weight."""
    proof, facts = run_streamed(config, run, output, began)
    extra = {"format": config.output.format, **{key: facts[key] for key in ("dtype", "task", "checked")}}
    extra["files"] = sorted(path.name for path in output.folder.glob("*.safetensors*"))
    if config.output.push is not None:
        extra["push"] = push(config, run, output.folder, proof)
    extra["next"] = f"kdtool evaluate {output.folder} --data {config.data.source or 'DATA'}"
    return Result("export", output.folder, proof, time.perf_counter() - began, None, extra)


def _fixed_length(config: RunConfig, task: Task, loaded: Loaded) -> int | None:
    """The one length in tokens that the graph of a model with patched attention will read; None where it may vary.

    Raises:
        UsageProblem: it is missing, does not fit, or there is no such graph.
    """
    length = config.method_values.get("length")
    if not (
        config.output.format == "onnx" and patched_layers(loaded.model) and check_exportable(loaded.model, loaded.ref)
    ):
        if length is not None:
            raise UsageProblem("method.length is for the graph of a model with patched attention")
        return None
    if "image" in task.columns:
        if length is not None:
            raise UsageProblem("method.length is for text: the images of a model have one size")
        return None
    if "text" not in task.columns:
        raise UsageProblem(
            f"patched attention is not exported for {task.name}",
            why="its inputs have no fixed length",
            hint="export the exact model",
        )
    if length is None:
        raise UsageProblem(
            f"the graph of '{loaded.ref}' needs one length",
            why="its attention is patched, and a tree over keys has a fixed size",
            hint="--set method.length=N, in tokens; shorter inputs are padded to it",
        )
    bound, beyond = positions(loaded)
    if bound is not None and int(length) > bound and not beyond:
        raise UsageProblem(f"method.length={length}: '{loaded.ref}' takes at most {bound} tokens")
    return int(length)


def _set_aside(folder: Path, report: ExportReport) -> list[str]:
    """Rename the graph of an export that failed its check, so that nobody loads it; returns the files."""
    if report.parity["passed"] or report.graph is None:
        return report.files
    failed = f"{report.graph}.failed"
    (folder / report.graph).rename(folder / failed)
    return [failed if name == report.graph else name for name in report.files]
