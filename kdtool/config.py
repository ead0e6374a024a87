"""The configuration of a run: sections, defaults, files, overrides; strict and torch-free.

Precedence: defaults, then the file (`-c`), then `--set` overrides, then command-line options.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from kdtool.errors import ConfigProblem, UsageProblem, nearest
from kdtool.registry import ATTENTION, COMPRESSORS, EXPORTERS, METHODS, Plugin, Registry

Command = Literal["distill", "compare", "compress", "patch-attention", "evaluate", "export"]


class Section(BaseModel):
    """Base of all sections: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_nul(cls, value: Any) -> Any:
        """No name, path or pattern holds a NUL, and the system refuses it in ways of its own."""
        if isinstance(value, str) and "\0" in value:
            raise ValueError("holds a NUL character")
        return value


_ENDPOINT = "endpoint:"
_TEXT_FILES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")


class TeacherSection(Section):
    """The model to learn from (or, for one-model commands, the model itself)."""

    model: str | None = None
    """Folder, Hub id with an optional @revision; where a method learns from texts also endpoint:URL#MODEL or a file."""
    cache: str | None = None
    """Folder of a teacher cache that stands for the teacher, written cache:FOLDER in place of a model."""
    fine_tune: bool = False
    """Fine-tune the teacher on the task first; the result is cached by fingerprint."""
    fine_tune_what: Literal["all", "head"] = "all"
    """Train all weights, or fit only the classifier head on frozen features."""
    fine_tune_epochs: float = Field(2.0, gt=0)
    """Length of that fine-tuning."""
    fine_tune_lr: float = Field(1e-4, gt=0)
    """Peak learning rate of that fine-tuning."""

    @property
    def writes_only(self) -> bool:
        """Whether it gives texts and no distributions: an endpoint, or a file of texts."""
        return self.is_file or (self.model or "").startswith(_ENDPOINT)

    @property
    def is_file(self) -> bool:
        """Whether it is a file of texts."""
        name = (self.model or "").lower()
        return name.endswith(_TEXT_FILES) and not name.startswith(_ENDPOINT)


class StudentSection(Section):
    """The model to train."""

    model: str | None = None
    """Folder, Hub id, configuration file (random weights), layers:N or layers:0,3,5."""
    init: Literal["auto", "weights", "random"] = "auto"
    """Start from the weights found (auto, weights) or from random ones."""
    freeze: list[str] = []
    """What stays as it is: `embeddings`, or parameter name patterns such as `*.layer.0.*`."""
    lora_rank: int | None = Field(None, gt=0)
    """Train low-rank additions (LoRA) of this rank to the student's layers, merged at the end; needs peft."""
    lora_alpha: float | None = Field(None, gt=0)
    """Their scale is lora_alpha / lora_rank (default: 2)."""
    lora_targets: list[str] = []
    """Names of the layers that get one, such as q_proj (default: all linear layers but the head)."""
    lora_adapter: bool = False
    """Keep the additions by themselves, too, in the folder `adapter` of the output."""


class DataSection(Section):
    """The examples and the meaning of their columns."""

    source: str | None = None
    """Hub id with optional :config, @revision, #split; folder; file; or a shipped set."""
    task: str | None = None
    """Task name; guessed from the teacher and the columns when absent."""
    train_split: str | None = None
    """Split to train on (default: train)."""
    validation_split: str | None = None
    """Split for choices made during training (default: validation or dev if there is one)."""
    test_split: str | None = None
    """Split of the final proof (default: test, else validation, else held out of train)."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Share of the training rows held out for the proof when the data has a single split."""
    text: str | None = None
    """Column with the text, or the first sentence of a pair."""
    text_pair: str | None = None
    """Column with the second sentence of a pair."""
    prompt: str | None = None
    """Column with the prompt of a language model."""
    input: str | None = None
    """Column with what the prompt speaks of, put behind it (instruction and input)."""
    response: str | None = None
    """Column with the response to learn."""
    messages: str | None = None
    """Column with conversations: lists of messages, each with role and content."""
    separator: str = "\n"
    """Text between prompt, input and response, where there is no white space already."""
    chat_template: bool = False
    """Put prompts and responses into the tokenizer's chat template, as conversations are."""
    long_prompts: Literal["drop", "cut"] = "drop"
    """Prompts that leave no room for a response: leave the row out, or cut the prompt on the left."""
    mask_share: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens of a text that masked-lm hides, at least one."""
    packing: bool | None = None
    """Put several rows of a causal language model side by side, apart from each other (default: where it can be)."""
    label: str | None = None
    """Column with the class."""
    image: str | None = None
    """Column with the image."""
    audio: str | None = None
    """Column with the audio."""
    features: list[str] | None = None
    """Columns that a model of tables sees (default: all but the label)."""
    ignore: list[str] = []
    """Columns that it does not see."""
    numeric: list[str] = []
    """Columns of it to take as numbers (default: those that hold only numbers)."""
    categorical: list[str] = []
    """Columns of it to take as names, such as codes written as numbers."""
    labels: list[str] | None = None
    """Class names in id order, where the data does not carry them."""
    label_map: Literal["refuse", "by-name"] | dict[str, str] = "refuse"
    """What to do when data and model disagree on classes: refuse, by-name, or {data: model}."""
    max_length: int | None = Field(None, gt=0)
    """Longest sequence in tokens (text) or samples (audio); longer ones are cut."""
    limit: int | None = Field(None, gt=0)
    """Use at most this many training rows (a seeded choice)."""
    test_limit: int | None = Field(None, gt=0)
    """Use at most this many test rows (a seeded choice)."""


class AugmentSection(Section):
    """Altered images to train on; the teacher sees what the student sees, rows to score stay as they are."""

    crop: float = Field(0.0, ge=0, lt=0.5)
    """Shift images by up to this share of their side, black beyond (0.125 is 4 of 32 pixels); 0 for none."""
    flip: bool = False
    """Mirror half of the images."""
    randaugment: int = Field(0, ge=0, le=8)
    """Operations of RandAugment for each image; needs kornia."""
    magnitude: int = Field(9, ge=0, le=30)
    """Their strength."""
    mixup: float = Field(0.0, ge=0, le=1)
    """Mix images and labels of pairs in shares drawn from Beta(mixup, mixup); 0 for none."""
    cutmix: float = Field(0.0, ge=0, le=1)
    """Paste a box of another image, of an area from Beta(cutmix, cutmix); with mixup half of the images each."""
    views: int = Field(0, ge=0)
    """Views of each row, used in turn, so that a teacher cache can hold them; 0 for a new one in each epoch."""
    seed: int = Field(0, ge=0)
    """Seed of the views; apart from runtime.seed, so that runs of several seeds can share a teacher cache."""

    @property
    def active(self) -> bool:
        """Whether anything is altered."""
        return bool(self.crop or self.flip or self.randaugment or self.mixup or self.cutmix)


class TrainSection(Section):
    """The training loop."""

    epochs: float = Field(3.0, gt=0)
    """Passes over the training rows; ignored when max_steps is given."""
    max_steps: int | None = Field(None, gt=0)
    """Optimiser steps."""
    batch_size: int = Field(32, gt=0)
    """Examples in one forward pass."""
    grad_accum: int = Field(1, gt=0)
    """Forward passes in one optimiser step."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate (default: set by the task)."""
    head_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the classifier head (default: lr)."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Update rule; sgd uses Nesterov momentum 0.9."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled decay on matrices; never on biases and norms."""
    warmup: float = Field(0.06, ge=0, le=1)
    """Share of the steps with rising learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after warm-up."""
    clip: float | None = Field(None, ge=0)
    """Largest gradient norm; 0 switches clipping off (default: 1 for adamw, off for sgd)."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """With several processes: whole student in each, or its parameters sharded over them."""
    buckets: bool = True
    """Batch examples of similar length together."""
    teacher_cache: bool | None = None
    """Keep what a frozen teacher says about each row (default: when rows are seen again)."""
    teacher_cache_dir: str | None = None
    """Folder of a cache to fill and to share between runs (default: inside the unfinished output)."""
    teacher_cache_top_k: int | None = Field(None, gt=0)
    """Keep only so many of the likeliest tokens of a language model; such a cache can stand for the teacher."""
    teacher_cache_limit: int = Field(default=4096, gt=0)
    """Largest size of a cache in MiB."""
    log_every: int = Field(10, gt=0)
    """Steps between two lines of the log."""
    checkpoint_every: int | None = Field(None, gt=0)
    """Steps between two checkpoints (default: ten in a run)."""
    resume: bool = True
    """Go on where an unfinished run of the same configuration stopped."""


class PatchSection(Section):
    """What patch-attention asks of a layer."""

    layers: str | None = None
    """Numbers of the attention layers to patch, such as 0-3,7 (default: all)."""
    calibrate: str | None = None
    """Data to choose the settings on (default: the training rows of the data)."""
    max_error: float = Field(0.1, ge=0)
    """Largest relative error of a head of a layer; a layer that would miss it stays exact. With 0 all do."""
    lengths: list[int] = Field([512, 2048], min_length=1)
    """Numbers of keys at which error and time are measured."""
    max_drop: list[str] = []
    """How much worse metrics may become, such as accuracy=0.005."""
    fixed: bool = False
    """Fix what an operator would work out from each input, as an export to ONNX needs it."""
    module_pattern: str | None = None
    """Names of modules with a fused projection `qkv` to take in, such as blocks.*.attn."""

    @field_validator("lengths")
    @classmethod
    def _long_enough(cls, value: list[int]) -> list[int]:
        if min(value) < 64:
            raise ValueError("should be 64 and more")
        return sorted(set(value))


class EvalSection(Section):
    """The proof."""

    benchmark: str | None = None
    """Named benchmark: columns, split and metrics in one word."""
    metrics: list[str] | None = None
    """Metrics to compute (default: those of the task)."""
    fail_under: list[str] = []
    """Gates such as accuracy=0.85 or accuracy.retention=0.97."""
    batch_size: int = Field(64, gt=0)
    """Examples in one forward pass of an evaluation."""
    max_new_tokens: int = Field(128, gt=0)
    """Most tokens a language model writes for each prompt, where a metric compares texts."""
    stop: list[str] = []
    """Strings that end what it writes, besides its end-of-sequence token."""
    answers: str = "number"
    """How exact-answer finds the answer in a text: number, text, or a data set with rules of its own, such as gsm8k."""
    temperature_scaling: Literal["val", "off"] = "val"
    """Fit a temperature on the validation rows, where there are any, and show calibration before and after it."""
    latency: bool = True
    """Measure latency of teacher and student."""
    latency_batches: list[int] = [1, 32]
    """Batch sizes at which latency is measured."""
    latency_repeats: int = Field(20, gt=0)
    """Timed forward passes for each model and batch size."""
    lengths: list[int] = []
    """Sequence lengths in tokens at which evaluate measures time and peak memory, too."""
    seeds: list[int] = [0, 1, 2]
    """Seeds of a comparison: every method runs once with each."""
    reload: bool = True
    """Reload the saved model in a fresh process and compare outputs."""

    @field_validator("lengths")
    @classmethod
    def _some_tokens(cls, value: list[int]) -> list[int]:
        if value and min(value) < 2:
            raise ValueError("should be 2 and more")
        return sorted(set(value))


class RecoverSection(Section):
    """Distilling a compressed model back from the model it was made of."""

    steps: int | None = Field(None, gt=0)
    """Optimiser steps; without them nothing is trained."""
    method: str = "kd"
    """Distillation method."""
    settings: dict[str, Any] = {}
    """Its hyper-parameters, such as recover.settings.temperature=2."""


class SearchSection(Section):
    """Looking for the settings of compressors that meet a budget."""

    budget: str | None = None
    """What may be left, as a share: parameters=0.5, bytes=0.25 or latency=0.5."""
    notches: int = Field(8, gt=1)
    """Steps from all to nothing in which a setting is turned down, before the last one is found by bisection."""


class OutputSection(Section):
    """Where the result goes."""

    folder: str | None = None
    """Output folder."""
    overwrite: bool = False
    """Replace what a non-empty output folder holds."""
    format: str = "safetensors"
    """Target format of export."""
    save_teacher: bool = False
    """Keep the teacher that an online method trained, or a mentor, in the folder `teacher` of the output."""
    dtype: Literal["keep", "float32", "float16", "bfloat16"] = "keep"
    """Number format of the saved weights."""
    max_shard_size: str = "5GB"
    """Largest weight file."""
    push: str | None = None
    """Hub repository to publish to."""
    private: bool | None = None
    """Create that repository private."""
    create_pr: bool = False
    """Publish as a pull request."""
    commit_message: str | None = None
    """Message of the published commit."""
    plots: bool = True
    """Draw plots beside the report."""


class RuntimeSection(Section):
    """The machine and what it may do."""

    seed: int = Field(0, ge=0)
    """Seed of all random generators."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of computation; auto is bfloat16 autocast on CUDA, float32 elsewhere."""
    threads: int | None = Field(None, gt=0)
    """CPU threads (default: what torch chooses)."""
    stream: Literal["auto", "always", "never"] = "auto"
    """Work weight by weight, never holding the model: auto does so where it and a copy would not fit into memory."""
    offline: bool = False
    """Never ask the network."""
    cache_dir: str | None = None
    """Hub cache folder (default: HF_HOME)."""
    trust_remote_code: bool = False
    """Run code that a model repository brings."""
    allow_pickle: bool = False
    """Load pickle checkpoints, weights only."""


class RunConfig(Section):
    """Everything a run needs; written to kdtool.json, and a run again when fed back."""

    command: Command = "distill"
    teacher: TeacherSection = TeacherSection()
    student: StudentSection = StudentSection()
    data: DataSection = DataSection()
    method: dict[str, Any] = {}
    augment: AugmentSection = AugmentSection()
    train: TrainSection = TrainSection()
    patch: PatchSection = PatchSection()
    recover: RecoverSection = RecoverSection()
    search: SearchSection = SearchSection()
    eval: EvalSection = EvalSection()
    output: OutputSection = OutputSection()
    runtime: RuntimeSection = RuntimeSection()

    @property
    def method_name(self) -> str:
        """Name of the plug-in that does the work."""
        return str(self.method.get("name", ""))

    @property
    def method_values(self) -> dict[str, Any]:
        """Hyper-parameters of that plug-in that were set."""
        return {key: value for key, value in self.method.items() if key != "name"}


def stages(config: RunConfig) -> list[tuple[str, dict[str, Any]]]:
    """Name and settings of each stage of `compress`, in order.

    Settings of one method stand beside its name, those of several under their names:
    `method.width.ffn=0.5`.
    """
    names = [name.strip() for name in config.method_name.split(",") if name.strip()]
    values = config.method_values
    return [(name, values if len(names) == 1 else dict(values.get(name) or {})) for name in names]


def before_recovery(names: Sequence[str]) -> int:
    """How many stages come before recovery: all but the last ones that training would undo or does not concern.

    Raises:
        UsageProblem: training would undo a stage before another one.
    """
    facts = [COMPRESSORS.info(name).facts for name in names]
    count = len(names)
    while count and (facts[count - 1].get("late") or not facts[count - 1].get("trainable", True)):
        count -= 1
    stuck = [name for name, fact in zip(names[:count], facts, strict=False) if not fact.get("trainable", True)]
    if stuck:
        raise UsageProblem(
            f"--recover cannot train what {stuck[0]} makes", hint=f"put {stuck[0]} last: recovery comes before it"
        )
    return count


def _check_stages(config: RunConfig, where: str) -> None:
    """Check the settings of each compressor; see `stages`."""
    found = stages(config)
    names = [name for name, _ in found]
    if len(set(names)) != len(names):
        raise ConfigProblem(f"{where}a compressor comes twice in '{config.method_name}'")
    for name, values in found:
        checked = check_plugin_values(COMPRESSORS.info(name), values, "method" + f".{name}" * (len(found) > 1), where)
        if len(found) > 1:
            config.method[name] = checked
        else:
            config.method = {"name": name, **checked}
    stray = [key for key in config.method_values if len(found) > 1 and key not in names]
    if stray:
        raise ConfigProblem(
            f"{where}unknown key 'method.{stray[0]}' for {config.method_name}",
            hint=f"settings of one of several are written method.{names[0]}.NAME",
        )


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-5 is a number and duplicate keys are errors."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _no_duplicates(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    keys: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.MarkedYAMLError(problem="a key that is no word", problem_mark=key_node.start_mark)
        if key in keys:
            raise yaml.MarkedYAMLError(problem=f"key '{key}' appears twice", problem_mark=key_node.start_mark)
        keys.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=deep)


_Loader.add_constructor("tag:yaml.org,2002:map", _no_duplicates)


def parse_scalar(text: str) -> Any:
    """Read the right-hand side of `--set key=value` as YAML (`1e-5`, `true`, `[a, b]`, `text`)."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader derives from SafeLoader
    except yaml.YAMLError:
        return text


def read_file(path: Path) -> tuple[dict[str, Any], str]:
    """Read a YAML or JSON configuration, or the `config` part of a `kdtool.json` manifest.

    Returns:
        The mapping and the text it came from (for line numbers).

    Raises:
        ConfigProblem: the file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.[yj]*")]) if path.parent.is_dir() else None
        raise ConfigProblem(f"configuration file {path} does not exist", hint=near) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigProblem(f"configuration file {path} cannot be read", why=str(error)) from None
    try:
        values = yaml.load(text, Loader=_Loader)  # noqa: S506
    except RecursionError:
        raise ConfigProblem(f"{path}: nested too deeply", hint="configurations are YAML or JSON mappings") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        why = getattr(error, "problem", None) or "not valid YAML"
        raise ConfigProblem(f"{where}: {why}", hint="configurations are YAML or JSON mappings") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigProblem(f"{path}: a configuration is a mapping of sections", hint="see: kdtool recipes show NAME")
    if "kdtool" in values and isinstance(values.get("config"), dict):
        values = values["config"]
    return values, text


def _line_of(text: str, keys: Sequence[str | int]) -> int | None:
    """Line (from 1) of the deepest part of a key path that the text holds."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        return None
    line: int | None = None
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            for key_node, value in node.value:
                if key_node.value == str(key):
                    line, node = key_node.start_mark.line + 1, value
                    break
            else:
                return line
        else:
            return line
    return line


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply `--set key.path=value` items to nested mappings, in order.

    Raises:
        ConfigProblem: an item has no `=`, an empty key, or goes through something that is no section.
    """
    for item in overrides:
        key, sign, value = item.partition("=")
        parts = key.strip().split(".")
        if not sign or not all(parts):
            raise ConfigProblem(f"--set {item}: not of the form key.path=value", hint="such as --set train.lr=1e-4")
        target = values
        for part in parts[:-1]:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise ConfigProblem(f"--set {item}: '{part}' is a value, not a section")
        target[parts[-1]] = parse_scalar(value)


def _known_keys(path: Sequence[str | int]) -> list[str]:
    model: Any = RunConfig
    for part in path:
        field = model.model_fields.get(str(part)) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        model = field.annotation
    if isinstance(model, type) and issubclass(model, BaseModel):
        return list(model.model_fields)
    return []


def key_paths() -> Iterator[str]:
    """All key paths of the configuration, such as `train.lr`."""
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from (f"{name}.{key}" for key in field.annotation.model_fields)
        else:
            yield name


def _unknown_key(where: str, path: Sequence[str | int]) -> ConfigProblem:
    name = ".".join(map(str, path))
    siblings = _known_keys(path[:-1])
    elsewhere = [full for full in key_paths() if full.rsplit(".", 1)[-1] == path[-1]]
    if elsewhere and not difflib.get_close_matches(str(path[-1]), siblings, cutoff=0.75):
        hint = f"did you mean {', '.join(elsewhere)}?"
    else:
        hint = nearest(str(path[-1]), siblings)
    return ConfigProblem(f"{where}unknown key '{name}'", hint=hint)


def _explain(error: ValidationError, path: Path | None, text: str) -> ConfigProblem:
    """One line for the first problem of a validation."""
    problem = error.errors(include_url=False)[0]
    location = [
        part for part in problem["loc"] if not (isinstance(part, str) and part.startswith(("literal[", "dict[")))
    ]
    line = _line_of(text, location) if text else None
    where = f"{path}:{line}: " if path and line else ""
    if problem["type"] == "extra_forbidden":
        return _unknown_key(where, location)
    name = ".".join(map(str, location))
    detail = str(problem["msg"]).replace("Input should", "should").removeprefix("Value error, ")
    return ConfigProblem(
        f"{where}{name}={problem['input']!r}: {detail}", hint="see: kdtool COMMAND --help, docs/configuration.md"
    )


_CACHE = "cache:"
"""Begins what stands in the place of a model where a cache stands for the teacher."""

_REGISTRY_OF: Mapping[str, Registry] = {
    "distill": METHODS,
    "patch-attention": ATTENTION,
}


def check_plugin_values(plugin: Plugin, values: Mapping[str, Any], prefix: str, where: str = "") -> dict[str, Any]:
    """Check hyper-parameters against a plug-in's declared settings, without importing it.

    Raises:
        ConfigProblem: an unknown name, a missing required one, or a value of the wrong type or range.
    """
    known = {setting.name: setting for setting in plugin.settings}
    names = {"Any": Any, "Literal": Literal, "Field": Field}
    from typing import Annotated

    names["Annotated"] = Annotated
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigProblem(
                f"{where}unknown key '{prefix}.{key}' for {plugin.name}",
                hint=f"{nearest(key, known)} See: kdtool methods show {plugin.name}",
            )
        annotation = eval(known[key].annotation, {"__builtins__": _TYPES}, names)  # noqa: S307 - our own plug-in source, names only
        try:
            checked[key] = TypeAdapter(annotation).validate_python(value, strict=True)
        except ValidationError as error:
            detail = str(error.errors(include_url=False)[0]["msg"]).replace("Input should", "should")
            raise ConfigProblem(
                f"{where}{prefix}.{key}={value!r}: {detail}", hint=f"see: kdtool methods show {plugin.name}"
            ) from None
    for setting in plugin.settings:
        if setting.required and setting.name not in checked:
            raise ConfigProblem(f"{plugin.name} needs --set {prefix}.{setting.name}=...", hint=setting.doc or None)
    return checked


_TYPES = {t.__name__: t for t in (int, float, str, bool, list, dict, tuple)} | {"None": None}


def load_config(
    command: Command,
    path: Path | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Merge defaults, file, `--set` items and command-line options into one checked configuration.

    Args:
        command: The subcommand this configuration is for.
        path: YAML or JSON file, or a `kdtool.json` manifest.
        overrides: `key.path=value` items.
        options: Key path to value; None values mean "not given".

    Raises:
        ConfigProblem: anything unknown, of the wrong type or out of range, with file and line.
    """
    values, text = read_file(path) if path else ({}, "")
    stated = values.get("command", command)
    if stated != command and (stated, command) != ("distill", "compare"):
        raise ConfigProblem(f"{path} is a configuration for 'kdtool {stated}', not 'kdtool {command}'")
    values["command"] = command
    if isinstance(values.get("method"), str):
        values["method"] = {"name": values["method"]}
    apply_overrides(values, overrides)
    method = values.get("method")
    if isinstance(method, dict) and "terms" in method and not (options or {}).get("method.name"):
        method.setdefault("name", "combine")
    for key, value in (options or {}).items():
        if value is not None:
            section, _, name = key.partition(".")
            target = values.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigProblem(f"'{section}' is a section, not a value", hint=f"write {section}: {{...}}")
            target[name] = value
    teacher = values.get("teacher")
    if isinstance(teacher, dict) and str(teacher.get("model")).startswith(_CACHE):
        teacher["cache"] = str(teacher.pop("model")).removeprefix(_CACHE)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise _explain(error, path, text) from None
    if command == "patch-attention" and not config.method_name:
        config.method = {"name": "cluster", **config.method}
    registry = _REGISTRY_OF.get(command)
    line = _line_of(text, ["method"]) if text else None
    where = f"{path}:{line}: " if line else ""
    if command == "export":
        # the plug-in is output.format, so its settings are all that `method` holds
        config.method = check_plugin_values(EXPORTERS.info(config.output.format), config.method, "method", where)
    elif command == "compress":
        _check_stages(config, where)
        recovery = METHODS.info(config.recover.method)
        config.recover.settings = check_plugin_values(recovery, config.recover.settings, "recover.settings", where)
    elif registry is not None and config.method_name:
        plugin = registry.info(config.method_name)
        checked = check_plugin_values(plugin, config.method_values, "method", where)
        config.method = {"name": plugin.name, **checked}
    return config


def dump_json(config: RunConfig) -> str:
    """The resolved configuration as JSON, in declaration order."""
    return json.dumps(config.model_dump(mode="json"), indent=2)
