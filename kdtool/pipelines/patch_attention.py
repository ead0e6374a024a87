"""`patch-attention`: attention of a trained model replaced by an operator, layer by layer, and proved."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdtool import gates, patching
from kdtool.card import write_card
from kdtool.data.examples import DataSplits, Examples
from kdtool.errors import DataProblem, QualityProblem, UsageProblem
from kdtool.models import Loaded, load, load_model
from kdtool.patching.capture import capture
from kdtool.patching.choose import Choice, Wish, choose
from kdtool.patching.fixed import check_fixable
from kdtool.patching.layers import Site, find_sites, implementation_of
from kdtool.pipelines import setup
from kdtool.pipelines.finished import read_proof
from kdtool.pipelines.measured import check_metrics
from kdtool.pipelines.output import Output
from kdtool.pipelines.prove import compare
from kdtool.pipelines.push import check_push, push
from kdtool.proof import Proof, Result
from kdtool.report import write_manifest, write_report
from kdtool.report._attention import attention_rows, attention_section
from kdtool.run import Run
from kdtool.saving import save_model
from kdtool.sections import RunConfig
from kdtool.tasks._base import Batch, Task, to_device
from kdtool.tasks._text import longest
from kdtool.verify import reload_check
from kdtool.writing import typed

_BATCH = 8
"""Calibration rows in one forward pass."""


def patch_attention(config: RunConfig, run: Run | None = None) -> Result:
    """Replace the attention of a trained model where that is accurate enough and faster, and prove it.

    Args:
        config: `teacher.model` is the model, `method` the operator, `patch` what is asked of it.
        run: Context (default: made from the configuration, silent).

    Returns:
        What was made; `extra["layers"]` says for each attention module what became of it.

    Raises:
        QualityProblem: the saved model does not give the outputs of the one in memory.
        KdtoolError: its other children say what went wrong.
    """
    began = time.perf_counter()
    run = run or setup.make_run(config)
    asked = config.model_copy(deep=True)
    if config.teacher.model is None or config.output.folder is None:
        raise UsageProblem(
            "patch-attention needs a model and an output folder", hint="kdtool patch-attention MODEL --data DATA -o OUT"
        )
    check_push(config, run)
    if config.patch.fixed:
        check_fixable(config.method_name)
    setup.begin(config, run)
    output = Output(Path(config.output.folder).expanduser(), asked)
    if output.complete:
        run.reporter.info(f"{output.folder} lacked only its last files; they are in place now")
        proof, manifest = read_proof(output.folder)
        proof.roles = ("patched model", "exact model")
        extra = {key: manifest[key] for key in ("task", "method", "layers", "calls")}
        return _conclude(config, run, output.folder, proof, extra, began)
    try:
        proof, extra = _patch(config, run, output, began)
        output.commit()
    except BaseException:
        output.release()
        raise
    return _conclude(config, run, output.folder, proof, extra, began)


def _conclude(config: RunConfig, run: Run, folder: Path, proof: Proof, extra: dict[str, Any], began: float) -> Result:
    """Publish if asked to, and say how it went."""
    extra = extra | {"next": f"kdtool evaluate {folder} --teacher {config.teacher.model} --data {config.data.source}"}
    result = Result("patch-attention", folder, proof, time.perf_counter() - began, None, extra)
    if config.output.push is not None:
        result.extra["push"] = push(config, run, folder, proof)
    if not proof.reload.get("passed", True):
        raise QualityProblem(
            f"the model in {folder} does not reproduce its outputs after reloading",
            why=f"largest difference {proof.reload['max_abs_diff']:.2e}",
        )
    return result


def _patch(config: RunConfig, run: Run, output: Output, began: float) -> tuple[Proof, dict[str, Any]]:
    """Everything up to the finished, staged result."""
    setup.apply_benchmark(config)
    task = setup.pick_task(config, config.teacher.model, run)
    check_metrics(config, task)
    rows, data = _rows(config, task, run)
    loaded = load_model(str(config.teacher.model), task.auto_class, run, "model")
    setup.check_trained(loaded, "model")
    setup.load_processor(loaded, task, run)
    setup.relabel(data, loaded, config, run)
    if patching.layers_of(loaded.model):
        run.reporter.info("the model is patched already: starting from its exact form")
        patching.remove(loaded.model)
        vars(loaded.model.config).pop(patching.KEY, None)
    before = implementation_of(loaded.model)
    encoded = task.encode(data.test, loaded, config, run)
    calibration = task.encode(rows, loaded, config, run)
    loaded.model.to(run.device).eval()
    choices = _choose(config, run, task, loaded, calibration)
    seed, pattern = run.seed, config.patch.module_pattern
    patching.patch(loaded.model, [choice.layer for choice in choices], config.method_name, seed, pattern)
    _see_called(choices, task, loaded, calibration, run)
    loaded.model.to("cpu")
    save_model(loaded, output.staging, config.output)
    reload: dict[str, Any] = {}
    if config.eval.reload:
        run.reporter.info("reloading the model in a fresh process")
        probe = task.example_inputs(encoded, min(_BATCH, len(encoded)))
        reload = reload_check(output.staging, task, loaded.model, probe, run.trust_remote_code)
    patching.remove(loaded.model, before)
    vars(loaded.model.config).pop(patching.KEY, None)
    model = load(output.staging, task.name, run).float()
    saved = Loaded(model, loaded.processor, str(output.folder), None, output.staging, loaded.facts)
    with patching.counting() as count:
        proof = compare(task, saved, loaded, encoded, config, run)
    proof.reload, proof.roles = reload, ("patched model", "exact model")
    assert proof.teacher is not None
    proof.gates += gates.check_drops(config.patch.max_drop, proof.student.metrics, proof.teacher.metrics)
    calls = {"approximate": count.approximate, "total": count.total}
    return proof, _document(config, run, output, proof, choices, calls, (task, loaded, began))


def _document(
    config: RunConfig,
    run: Run,
    output: Output,
    proof: Proof,
    choices: Sequence[Choice],
    calls: dict[str, int],
    made: tuple[Task, Loaded, float],
) -> dict[str, Any]:
    """Write report, card and manifest; gives the further fields of the result."""
    task, loaded, began = made
    lengths = config.patch.lengths
    section = attention_section(output.staging, choices, lengths, calls, config.output.plots)
    write_report(output.staging, proof, [], config, config.output.plots, section)
    left = sum(choice.layer.reason is not None for choice in choices)
    limits = [
        "Plain transformers loads the exact model; `kdtool.load` loads it with the attention described here.",
        f"{left} of {len(choices)} attention layers are exact; `report.md` says why.",
    ]
    command = run.provenance.get("command") or "kdtool patch-attention -c kdtool.json"
    facts = {"task": task.name, "labels": loaded.labels, "loads_with": "kdtool", "limits": limits}
    write_card(output.staging, proof, config, facts | {"command_line": run.provenance.get("command", "")})
    extra: dict[str, Any] = {"task": task.name, "method": config.method_name, "calls": calls}
    extra["layers"] = attention_rows(choices, lengths)
    seconds = time.perf_counter() - began
    write_manifest(output.staging, config, proof, run, typed(command), {"seconds": seconds, **extra})
    return extra


def _rows(config: RunConfig, task: Task, run: Run) -> tuple[Examples, DataSplits]:
    """Rows to calibrate on, and the data of the proof; without the one the other serves for both."""
    other = config.patch.calibrate
    if config.data.source is None:
        config.data.source, other = other, None
    if other is None:
        data = setup.get_data(config, task, run)
        return data.train or data.test, data
    data = setup.get_data(config, task, run, score_only=True)
    calibration = config.model_copy(deep=True)
    calibration.data.source = other
    calibration.data.train_split = calibration.data.test_split = None
    proof_data = run.provenance["data"]
    found = setup.get_data(calibration, task, run)
    run.provenance |= {"calibration": run.provenance["data"], "data": proof_data}
    return found.train or found.test, data


def _batches(task: Task, rows: Examples, run: Run) -> Iterator[Batch]:
    """Inputs of the calibration rows in a seeded order."""
    order = np.random.default_rng(run.seed).permutation(len(rows))
    for start in range(0, len(rows), _BATCH):
        part = rows.select(order[start : start + _BATCH].tolist())
        yield to_device(task.example_inputs(part, len(part)), run.device)


def _choose(config: RunConfig, run: Run, task: Task, loaded: Loaded, rows: Examples) -> list[Choice]:
    """Find the attention modules, let them see real inputs, and choose for each.

    Raises:
        DataProblem: the rows hold fewer positions than the longest length.
        UsageProblem: a number of a layer that is not there.
    """
    asked = config.patch
    model = loaded.model
    first = next(_batches(task, rows, run))
    sites = find_sites(model, lambda: task.forward(model, first).logits, asked.module_pattern)
    chosen = patching.parse_layers(asked.layers, len(sites))
    wanted = max(asked.lengths)
    open_sites = [site for site in sites if site.reason is None and site.number in chosen]
    run.reporter.info(f"{len(sites)} attention layers, {len(open_sites)} to be patched; reading real inputs")
    runs = (_forward(task, loaded, batch) for batch in _batches(task, rows, run))
    seen = capture(model, open_sites, runs, wanted)
    short = min((one.length for one in seen), default=wanted)
    if short < wanted:
        raise DataProblem(
            f"the calibration rows hold only {short} positions, and --lengths asks for {wanted}",
            hint="name more rows with --calibrate, or shorter --lengths; texts are cut at data.max_length",
        )
    made: dict[int, Choice] = {}
    for site, found in zip(open_sites, seen, strict=True):
        run.reporter.progress("layers", len(made), len(open_sites), {"layer": site.number})
        limit = _limit(task, loaded, found.longest)
        values = {key: value for key, value in config.method_values.items() if key != "min_length"}
        bounds = (asked.max_error, asked.lengths, limit, _fixed_length(config))
        wish = Wish(config.method_name, values, *bounds, run.seed, asked.fixed)
        made[site.number] = choose(site.number, site.name, found, wish)
    return [made[site.number] if site.number in made else _left(site) for site in sites]


def _forward(task: Task, loaded: Loaded, batch: Batch) -> Any:
    return lambda: task.forward(loaded.model, batch)


def _left(site: Site) -> Choice:
    return Choice(site.number, patching.Layer(site.name, "exact", reason=site.reason or "not among --layers"))


def _fixed_length(config: RunConfig) -> int | None:
    """The fewest keys to approximate, where the user set them."""
    value = config.method_values.get("min_length")
    return None if value is None else int(value)


def _limit(task: Task, loaded: Loaded, seen: int) -> int | None:
    """Longest input a model takes, in positions; None where nothing limits it."""
    if "text" in task.columns:
        bound = longest(loaded, None, sys.maxsize)
        return None if bound == sys.maxsize else bound
    return seen if "image" in task.columns else None


@torch.no_grad()
def _see_called(choices: Sequence[Choice], task: Task, loaded: Loaded, rows: Examples, run: Run) -> None:
    """Run the patched model on inputs that are long enough, and note in which layers the operator ran.

    Raises:
        ModelProblem: a patched module never asked for attention.
        QualityProblem: one asked, and was answered exactly.
    """
    patched = {choice.layer.name: choice for choice in choices if choice.layer.reason is None}
    if not patched:
        return
    need = max(choice.layer.min_length for choice in patched.values())
    batch = _lengthened(next(_batches(task, rows, run)), need)
    patching.check_called(loaded.model, lambda: task.forward(loaded.model, batch))
    modules = {id(module): name for name, module in patching.names_of(loaded.model).items() if name in patched}

    def note(seen: Any) -> None:
        name = modules.get(id(seen.module))
        if name is not None and seen.approximate:
            patched[name].called = True

    with patching.watching(note):
        task.forward(loaded.model, batch)
    for name, choice in patched.items():
        if not choice.called:
            raise QualityProblem(
                f"attention module '{name}' is patched, but answered {need} keys exactly",
                why="its inputs do not grow with the model's",
                hint=f"leave it out with --layers; it is number {choice.number}",
            )


def _lengthened(batch: Batch, length: int) -> Batch:
    """Two rows of token ids repeated to a length; a waveform that often; images as they are."""
    made = {key: value[:2] for key, value in batch.items()}
    if "input_ids" in made:
        ids = made["input_ids"]
        times = -(-length // ids.shape[1])
        made = {k: v.repeat(1, times)[:, :length] if v.shape == ids.shape else v for k, v in made.items()}
    elif "input_values" in made:
        width = next(iter(made.values())).shape[1]
        times = -(-length * 400 // width)  # an encoder of waveforms makes one position of a few hundred samples
        made = {k: v.repeat(1, times) for k, v in made.items()}
    return made
