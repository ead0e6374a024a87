"""Models that are larger than memory: read, changed and written weight by weight.

Nothing is run, so outputs cannot be compared. Instead every weight that is written is looked at: names and
shapes must be those that the new configuration asks for, and all numbers finite.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from kdtool import lazy
from kdtool.card import write_card
from kdtool.compressors._base import Context, Made, skeleton
from kdtool.compressors.vocab import renumber_config
from kdtool.config import stages
from kdtool.errors import KdtoolError, UsageProblem
from kdtool.exporters._base import save_parts
from kdtool.lazy import State
from kdtool.models import Loaded, fit, load_skeleton, resolve
from kdtool.pipelines import setup
from kdtool.pipelines.output import Output
from kdtool.pipelines.prove import weight_bytes
from kdtool.proof import Proof, Side
from kdtool.registry import COMPRESSORS, check_fit
from kdtool.report import write_manifest, write_report
from kdtool.run import Run
from kdtool.saving import stored_dtype
from kdtool.sections import RunConfig
from kdtool.tasks._base import Task
from kdtool.writing import typed

_COPIES = 3
"""Times that a model in float32 is held by a run that compares it with what it makes."""
CHECKED = "names, shapes and finite numbers; outputs were not compared, because the model was never held in memory"


def free_memory() -> int:
    """Bytes that this process may still take, as far as the system says."""
    if sys.platform == "win32":
        return sys.maxsize
    import resource

    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return min([free, *(limit for limit in limits if limit != resource.RLIM_INFINITY)])


def wanted(config: RunConfig, run: Run) -> bool:
    """Whether a run should work weight by weight.

    Raises:
        UsageProblem: it was asked for, and something in the run needs the whole model.
    """
    if config.runtime.stream == "never":
        return False
    obstacle = _obstacle(config)
    if config.runtime.stream == "always":
        if obstacle is not None:
            raise UsageProblem(f"runtime.stream=always: {obstacle} needs the whole model in memory")
        return True
    reference = str(config.teacher.model)
    folder, _ = resolve(reference, run)
    large = _COPIES * 2 * weight_bytes(folder) > free_memory()
    if large and obstacle is not None:
        run.reporter.warn(f"this model may not fit into memory, and {obstacle} needs all of it")
    return large and obstacle is None


def _obstacle(config: RunConfig) -> str | None:
    """What needs the whole model; None where nothing does."""
    if config.command == "export":
        return None if config.output.format == "safetensors" else f"--format {config.output.format}"
    for name, values in stages(config):
        if not COMPRESSORS.info(name).facts.get("streams"):
            return name
        asks = next((f"{name} with {k}={v}" for k, v in values.items() if v in ("change", "loss", "wanda")), None)
        if asks is not None:
            return asks
    for what, given in (
        ("--recover", config.recover.steps),
        ("--budget", config.search.budget),
        ("--fail-under", config.eval.fail_under or None),
    ):
        if given is not None:
            return what
    return None


def _change(loaded: Loaded, state: State, context: Context, config: RunConfig) -> tuple[Loaded, State, list[Any]]:
    """All stages in turn, none of them computed yet."""
    records = []
    for name, values in stages(config):
        made: Made = COMPRESSORS.module(name).stream(loaded, state, COMPRESSORS.build_config(name, values), context)
        model = skeleton(loaded, made.config, context)
        facts = {**loaded.facts, "ids": made.facts.get("ids"), **made.facts}
        processor = loaded.processor if made.processor is None else made.processor
        loaded, state = Loaded(model, processor, loaded.ref, None, None, facts), made.state
        fit(model, state, loaded.ref)
        shown = {key: value for key, value in made.facts.items() if key not in ("ids", "kept")}
        records.append({"name": name, "parameters": loaded.parameters, "made": shown})
    return loaded, state, records


def _write(loaded: Loaded, state: State, source: Path, folder: Path, config: RunConfig, run: Run) -> str:
    """Write weights, configuration and processor; returns the number format.

    Raises:
        KdtoolError: a weight is not finite.
    """
    dtype = stored_dtype(loaded, config.output.dtype)
    kind = getattr(torch, dtype)
    model: Any = loaded.model
    state = {name: tensor.to(kind) for name, tensor in state.items()}
    limit = lazy.size_in_bytes(config.output.max_shard_size)
    for count, (name, value) in enumerate(lazy.write(state, folder, limit, lazy.header(source)), 1):
        run.reporter.progress("writing", count, len(state), {})
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise KdtoolError(f"the weight '{name}' is not finite", hint="look at the model it came from")
    model.config.dtype = kind
    save_parts(loaded, folder)
    if (source / "generation_config.json").is_file():
        generation = transformers.GenerationConfig.from_pretrained(source)
        if loaded.facts.get("kept") is not None:
            renumber_config(generation, {old: new for new, old in enumerate(loaded.facts["kept"].tolist())})
        generation.save_pretrained(folder)
    return dtype


def _context(task: Task, loaded: Loaded, config: RunConfig, run: Run) -> Context:
    """What stages get: rows to count tokens in where there is data, and nothing that asks for the model to run."""
    if config.data.source is None:
        return Context(task, None, run)
    data = setup.get_data(config, task, run)
    rows = data.train if data.train is not None else data.test
    return Context(task, None, run, task.encode(rows, loaded, config, run))


def run_streamed(config: RunConfig, run: Run, output: Output, began: float) -> tuple[Proof, dict[str, Any]]:
    """Compress or convert a model weight by weight, and document it.

    Args:
        config: Of `compress`, or of `export` to safetensors.
        run: Context.
        output: The claimed folder; committed at the end.
        began: When the run began, by `time.perf_counter`.

    Returns:
        Sizes before and after, and what the manifest says of the run.

    Raises:
        KdtoolError: a stage cannot work this way, or a weight is not finite.
    """
    assert config.teacher.model is not None
    task = setup.pick_task(config, config.teacher.model, run)
    for name, _ in stages(config) if config.command == "compress" else ():
        check_fit(name, task.name, COMPRESSORS)
    loaded, state = load_skeleton(config.teacher.model, task.auto_class, run)
    source = loaded.folder
    assert source is not None
    setup.load_processor(loaded, task, run)
    run.reporter.info(f"weight by weight: {loaded.parameters:,} parameters are never held together")
    before = Side(loaded.ref, loaded.revision, loaded.parameters, weight_bytes(source), {})
    made, records = loaded, list[Any]()
    if config.command == "compress":
        made, state, records = _change(loaded, state, _context(task, loaded, config, run), config)
    dtype = _write(made, state, source, output.staging, config, run)
    after = Side(str(output.folder), None, made.parameters, weight_bytes(output.staging), {})
    proof = Proof(after, before)
    facts: dict[str, Any] = {"task": task.name, "stages": records, "steps": 0, "dtype": dtype, "checked": CHECKED}
    write_report(output.staging, proof, [], config, plots=False, section=_section(records))
    command = run.provenance.get("command", "")
    write_card(output.staging, proof, config, {"task": task.name, "labels": made.labels, "command_line": command})
    extra = {**facts, "seconds": time.perf_counter() - began}
    write_manifest(output.staging, config, proof, run, typed(command or "kdtool compress -c kdtool.json"), extra)
    output.commit()
    return proof, facts


def _section(records: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"- `{r['name']}`: {r['parameters']:,} parameters" for r in records]
    return ["## Checks", "", f"Of every weight written: {CHECKED}.", "", *lines, *([""] if lines else [])]
