"""README.md of a result: a model card with the Hub's metadata, the command, the numbers, the limits."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdtool.errors import UsageProblem
from kdtool.hub import ModelRef
from kdtool.proof import Proof, Side, table_of
from kdtool.registry import TASKS
from kdtool.sections import RunConfig
from kdtool.writing import typed, write_text

_PIPELINE_TAG = {
    "text-classification": "text-classification",
    "token-classification": "token-classification",
    "causal-lm": "text-generation",
    "seq2seq-lm": "text-generation",
    "masked-lm": "fill-mask",
    "sentence-similarity": "sentence-similarity",
    "image-classification": "image-classification",
    "image-segmentation": "image-segmentation",
    "instance-segmentation": "image-segmentation",
    "promptable-segmentation": "mask-generation",
    "audio-classification": "audio-classification",
    "speaker-verification": "audio-classification",
    "dual-encoder": "zero-shot-image-classification",
    "vision-language": "image-text-to-text",
    "speech-language": "audio-text-to-text",
    "tabular-classification": "tabular-classification",
}
"""The Hub's word for each task of kdtool."""

_DATA_ID = re.compile(r"^([\w.-]+/[\w.-]+?)(?::[^@#]*)?(?:@[^#]*)?(?:#.*)?$")


def _hub_model(text: str | None) -> str | None:
    """The Hub id in a model reference; None for folders, files, `layers:N` and nothing."""
    try:
        reference = ModelRef.parse(text) if text else None
    except UsageProblem:
        return None
    return reference.name if reference and reference.folder is None else None


def _hub_data(text: str | None) -> str | None:
    """The Hub id in a data reference; None for files, folders and shipped sets."""
    match = _DATA_ID.match(text or "")
    if match is None or text is None or Path(text).exists() or text.endswith((".jsonl", ".gz", ".csv", ".parquet")):
        return None
    return match[1]


def _base_model(config: RunConfig) -> str | None:
    """What the weights come from: the student's id where it was given as one, else the teacher's."""
    student = _hub_model(config.student.model) if config.command == "distill" else None
    return student or _hub_model(config.teacher.model)


def _method_tag(config: RunConfig) -> str:
    return {"distill": "knowledge-distillation", "compress": "model-compression"}.get(config.command, config.command)


def _results(proof: Proof, facts: Mapping[str, Any], task: str | None, data: str | None) -> list[Any]:
    """The model-index entries: one for each finite metric of the model."""
    from huggingface_hub import EvalResult

    source = str(facts.get("dataset_name") or data or "unnamed data")
    return [
        EvalResult(
            task_type=_PIPELINE_TAG.get(task or "", task or "other"),
            dataset_type=str(facts.get("dataset_type") or data or source),
            dataset_name=source,
            dataset_config=facts.get("dataset_config"),
            dataset_split=facts.get("dataset_split"),
            dataset_revision=facts.get("dataset_revision"),
            metric_type=name.replace("-", "_"),
            metric_name=name,
            metric_value=round(value, 6),
        )
        for name, value in proof.student.metrics.items()
        if math.isfinite(value)
    ]


def _metadata(name: str, proof: Proof | None, config: RunConfig, facts: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    task = facts.get("task") or config.data.task
    data = facts.get("dataset") or _hub_data(config.data.source)
    results = _results(proof, facts, task, data) if proof and config.data.source else []
    tags = ["kdtool", _method_tag(config), config.method_name]
    fields = {
        "library_name": facts.get("library_name") or "transformers",
        "license": facts.get("license"),
        "language": facts.get("language"),
        "base_model": facts.get("base_model") or _base_model(config),
        "datasets": [data] if data else None,
        "metrics": [name.replace("-", "_") for name in proof.student.metrics]
        if proof and proof.student.metrics
        else None,
        "pipeline_tag": facts.get("pipeline_tag") or _PIPELINE_TAG.get(task or ""),
        "tags": list(dict.fromkeys(tag for tag in (*tags, *facts.get("tags", ())) if tag)),
    }
    card = ModelCardData(model_name=name, eval_results=results or None, **fields)
    return str(card.to_yaml(line_break="\n")).strip()


def _named(side: Side) -> str:
    return f"`{side.name}`" + (f" at revision `{side.revision}`" if side.revision else "")


def _introduction(name: str, proof: Proof | None, config: RunConfig) -> list[str]:
    made = {
        "distill": f"A student distilled with the method `{config.method_name or 'unnamed'}`",
        "compress": f"A model made smaller with `{config.method_name}`",
        "patch-attention": f"A model with the attention operator `{config.method_name}`",
        "export": "An exported model",
    }.get(config.command, "A model")
    origin = {"distill": " by the teacher "}.get(config.command, ", from ")
    source = _named(proof.teacher) if proof and proof.teacher else f"`{config.teacher.model}`"
    known = bool((proof and proof.teacher) or config.teacher.model)
    data = f", on the data `{config.data.source}`" if config.data.source else ""
    return [f"# {name}", "", f"{made}{origin + source if known else ''}{data}. Made with kdtool.", ""]


def _own_architecture(folder: Path) -> bool:
    """True if the saved model is of an architecture that only kdtool knows."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and str(values.get("model_type", "")).startswith("kdtool-")


def _task_facts(task: str | None) -> tuple[str, str | None]:
    """Auto class of a task's models, and that of their processor."""
    found = TASKS.info(task).facts if task in TASKS.names() else {}
    processors = {"text": "AutoTokenizer", "image": "AutoImageProcessor", "audio": "AutoFeatureExtractor"}
    roles = [role for role in found.get("columns", ()) if role in processors]
    return found.get("auto_class", "AutoModel"), processors[roles[0]] if len(roles) == 1 else None


def _load(folder: Path, where: str, task: str | None, facts: Mapping[str, Any]) -> list[str]:
    """How to load the result, with plain transformers where that suffices."""
    if facts.get("use"):
        return ["## Use", "", *facts["use"], ""]
    own = "kdtool" if _own_architecture(folder) else "transformers"
    if facts.get("loads_with", own) == "kdtool":
        code = ["import kdtool", "", f'model = kdtool.load("{where}")']
        note = "This architecture is not part of transformers; kdtool loads it:"
    else:
        auto, processor = _task_facts(task)
        auto, processor = facts.get("auto_class", auto), facts.get("processor_class", processor)
        names = ", ".join(sorted(name for name in (auto, processor) if name))
        code = [f"from transformers import {names}", "", f'model = {auto}.from_pretrained("{where}")']
        code += [f'processor = {processor}.from_pretrained("{where}")'] if processor else []
        note = "Plain transformers loads it, without kdtool:"
    return ["## Use", "", note, "", "```python", *code, "```", ""]


def _limits(proof: Proof | None, config: RunConfig, facts: Mapping[str, Any]) -> list[str]:
    rows, split = facts.get("test_rows"), facts.get("dataset_split")
    where = f" on {rows:,} rows" if isinstance(rows, int) else ""
    where += f" of the split `{split}`" if split else ""
    lines = []
    if proof and proof.student.metrics:
        lines.append(
            f"- The numbers were measured{where}, in one run with seed {config.runtime.seed}; other data will differ."
        )
    if proof and proof.student.latency:
        lines.append("- Latency depends on the machine; `kdtool.json` says which one it was measured on.")
    if config.command == "distill":
        lines.append("- A student takes over its teacher's errors and biases, and may add its own on rare cases.")
    else:
        lines.append(
            "- The errors and biases of the model it was made from remain, and rare cases may have become worse."
        )
    missed = [gate for gate in (proof.gates if proof else []) if not gate.passed]
    lines += [f"- A quality bar was missed: {gate}." for gate in missed]
    if proof and proof.reload and not proof.reload.get("passed", True):
        lines.append("- The saved files did not reproduce the outputs of the model in memory.")
    if not facts.get("license"):
        lines.append("- No licence is stated here; those of the source model and of the data apply.")
    return ["## Limits", "", *lines, *(f"- {text}" for text in facts.get("limits", ())), ""]


def write_card(folder: Path, proof: Proof | None, config: RunConfig, facts: Mapping[str, Any]) -> None:
    """Write `README.md`, a model card; the same inputs give the same bytes.

    Args:
        folder: The result folder.
        proof: What was measured; None if nothing was.
        config: The resolved configuration.
        facts: What else is known, all optional: `command_line` (text or words), `name`, `task`,
            `license`, `language`, `base_model`, `library_name`, `pipeline_tag`, `tags`, `dataset` (Hub
            id), `dataset_name`, `dataset_type`, `dataset_config`, `dataset_split`, `dataset_revision`,
            `test_rows`, `loads_with` (`transformers` or `kdtool`), `auto_class`, `processor_class`,
            `use` (lines that say how to load the result), `limits` (sentences). How the result loads
            follows from the task and the saved `config.json` unless stated.

    Raises:
        OutputProblem: the folder cannot be written.
    """
    name = str(facts.get("name") or config.output.push or Path(config.output.folder or folder).name)
    command: str | Sequence[str] = facts.get("command_line") or f"kdtool {config.command} -c kdtool.json -o NEW"
    lines = ["---", _metadata(name, proof, config, facts), "---", "", *_introduction(name, proof, config)]
    if proof:
        table = table_of(proof)
        rule = "| --- |" + " ---: |" * (len(table.header) - 1)
        lines += ["## Results", "", f"| {' | '.join(table.header)} |", rule]
        lines += [f"| {' | '.join(row)} |" for row in table.rows]
        lines += ["", "More in `report.md`.", ""]
    lines += _load(
        folder, config.output.push or config.output.folder or name, facts.get("task") or config.data.task, facts
    )
    lines += ["## Reproduce", "", "```bash", typed(command), "```", ""]
    lines += ["`kdtool.json` holds the configuration, revisions, versions and file hashes of the run.", ""]
    lines += _limits(proof, config, facts)
    write_text(folder / "README.md", "\n".join(lines))
