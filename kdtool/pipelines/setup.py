"""From a configuration to loaded models and encoded data."""

import copy
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdtool import lora
from kdtool.benchmarks import HARNESS, load_benchmark
from kdtool.data.examples import DataSplits, Examples
from kdtool.data.labels import match_labels
from kdtool.data.sources import load_data
from kdtool.derive import from_layers
from kdtool.errors import ConfigProblem, ModelProblem, UsageProblem
from kdtool.models import (
    Loaded,
    auto_class,
    auto_class_of,
    from_config_file,
    load_model,
    plain_model_errors,
    read_config,
    read_json,
    resolve,
)
from kdtool.patching import KEY, install, layers_of
from kdtool.pipelines.architectures import task_by_optimum
from kdtool.pipelines.measured import check_responses
from kdtool.registry import METHODS, TASKS
from kdtool.run import Reporter, Run, Silent
from kdtool.sections import RunConfig
from kdtool.tasks._base import TEACHER_PREFIX, Task
from kdtool.teacher_cache import read_marks
from kdtool.train import parallel
from kdtool.train.state import seed_everything

_TASK_OF_AUTO = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForCausalLM": "causal-lm",
    "AutoModelForSeq2SeqLM": "seq2seq-lm",
    "AutoModelForMaskedLM": "masked-lm",
}
_TABULAR = frozenset({"kdtool-tabular", "TabularClassifier", "SimKDForTabularClassification"})


def make_run(config: RunConfig, reporter: Reporter | None = None, command_line: str = "") -> Run:
    """The context of a run: device and number format chosen.

    Raises:
        UsageProblem: the device asked for is not there.
    """
    runtime = config.runtime
    device = pick_device(runtime.device)
    dtype: str | None = runtime.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else None
    elif dtype == "float32":
        dtype = None
    return Run(
        seed=runtime.seed,
        device=device,
        dtype=dtype,
        reporter=reporter or Silent(),
        offline=runtime.offline,
        cache_dir=runtime.cache_dir,
        trust_remote_code=runtime.trust_remote_code,
        allow_pickle=runtime.allow_pickle,
        provenance={"command": command_line},
    )


def pick_device(name: str) -> str:
    """Turn `auto` into what there is, and refuse what there is not.

    Raises:
        UsageProblem: no such device.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    kind = name.split(":")[0]
    if kind not in there:
        raise UsageProblem(f"unknown device '{name}'", hint="auto, cpu, cuda, cuda:N or mps")
    if not there[kind]:
        raise UsageProblem(f"device '{name}' is not available here", hint="--device auto takes what there is")
    return name


def begin(config: RunConfig, run: Run) -> None:
    """Set what holds for the whole process: seeds, threads."""
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    parallel.join(run)
    seed_everything(run.seed)


def apply_benchmark(config: RunConfig) -> None:
    """Fill in what a named benchmark says and the configuration leaves open."""
    if config.eval.benchmark is None:
        return
    if config.eval.benchmark.startswith(HARNESS):
        raise UsageProblem(
            f"--benchmark {config.eval.benchmark} scores a finished model, it is no data for {config.command}",
            hint=f"kdtool evaluate MODEL --benchmark {config.eval.benchmark}",
        )
    benchmark = load_benchmark(config.eval.benchmark)
    for key in ("task", "source", "text", "text_pair", "label", "image", "audio", "train_split", "test_split"):
        value = getattr(benchmark, key)
        if value is not None and getattr(config.data, key) is None:
            setattr(config.data, key, value)
    if config.eval.metrics is None and benchmark.metrics:
        config.eval.metrics = list(benchmark.metrics)


def apply_method(config: RunConfig) -> None:
    """Fill in what a method's students are measured by, where nothing is asked for."""
    own = METHODS.info(config.method_name).facts.get("metrics")
    if own and config.eval.metrics is None:
        config.eval.metrics = list(own)


def first_model(config: RunConfig) -> str | None:
    """The model whose configuration says what a run is about: the teacher, unless it gives only texts."""
    return config.student.model if config.teacher.writes_only else config.teacher.model or config.student.model


def pick_task(config: RunConfig, reference: str | None, run: Run) -> Task:
    """The task asked for, or the one that the model's architecture names.

    Raises:
        UsageProblem: unknown or not to be guessed.
    """
    name = config.data.task
    if name is None and config.teacher.cache is not None:
        name = read_marks(Path(config.teacher.cache).expanduser()).get("task")
    if name is None and reference is not None:
        path = Path(reference).expanduser()
        if path.suffix == ".json" and path.is_file():
            name = _task_without_auto(read_json(path))
        else:
            folder, _ = resolve(reference, run, _role(config, reference))
            name = _task_of(read_config(folder, reference))
            if name == "masked-lm" and config.data.label is not None:
                name = "text-classification"  # its body, with a new head
    if name is None:
        roles = [key for key in ("text", "image", "audio") if getattr(config.data, key)]
        guess = {"text": "text-classification", "image": "image-classification", "audio": "audio-classification"}
        name = guess[roles[0]] if len(roles) == 1 else None
    if name is None:
        raise UsageProblem("the task cannot be told from the model", hint=f"--task {'|'.join(TASKS.names())}")
    config.data.task = TASKS.check(name)
    task: Task = TASKS.get(name)()
    return task


def _task_of(values: dict[str, Any]) -> str | None:
    """The task of a model by its config.json."""
    return _task_without_auto(values) or _TASK_OF_AUTO.get(auto_class_of(values)) or task_by_optimum(values)


def _task_without_auto(values: dict[str, Any]) -> str | None:
    """The task of those architectures of kdtool for which transformers has no Auto class of its own."""
    names = [str(values.get("model_type")), *map(str, values.get("architectures") or ())]
    return "tabular-classification" if any(name in _TABULAR for name in names) else None


def _role(config: RunConfig, reference: str) -> str:
    """What a model is to a run, for messages and provenance."""
    if config.command != "distill":
        return "model"
    return "teacher" if reference == config.teacher.model else "student"


def load_processor(loaded: Loaded, task: Task, run: Run, fallback: Loaded | None = None) -> None:
    """Give a model its tokenizer, image processor or feature extractor.

    Raises:
        ModelProblem: the folder has none and there is nothing to fall back on.
    """
    wanted = _processor_files(task)
    found = stored_processor(loaded.folder, loaded.ref, task, run)
    if found is not None:
        loaded.processor = found
    elif fallback is not None and fallback.processor is not None:
        loaded.processor = fallback.processor
    elif loaded.processor is None:
        raise ModelProblem(
            f"'{loaded.ref}' has no processor files",
            why=f"none of {', '.join(wanted[:2])}",
            hint="copy them from the model it came from",
        )


def _processor_files(task: Task) -> tuple[str, ...]:
    names = {
        "AutoTokenizer": ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model", "spiece.model")
    }
    return names.get(task.processor_class, ("preprocessor_config.json", "processor_config.json"))


def stored_processor(folder: Path | None, ref: str, task: Task, run: Run) -> Any:
    """The processor whose files a folder holds; None where it holds none."""
    if folder is None or not any((folder / name).is_file() for name in _processor_files(task)):
        return None
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": run.trust_remote_code}
    if task.processor_class == "AutoImageProcessor":
        options["backend"] = "pil"
    with plain_model_errors(ref):
        return auto_class(task.processor_class).from_pretrained(folder, **options)


def described(
    path: Path, task: Task, data: DataSplits, config: RunConfig, run: Run, teacher: Loaded | None = None
) -> Loaded:
    """A model with random weights from a configuration file, with its processor.

    The processor is the one beside the file, else the teacher's, else one fitted on the training
    rows where the task can; the model gets as many inputs as it makes.

    Raises:
        ModelProblem: the file does not fit, or there is no processor.
    """
    processor = stored_processor(path.parent, str(path), task, run)
    if processor is None:
        processor = teacher.processor if teacher is not None else task.fit_processor(data.train, config, run)
    more = task.model_values(processor) if processor is not None else {}
    loaded = from_config_file(path, task.auto_class, data.labels, more)
    loaded.processor = processor
    load_processor(loaded, task, run, teacher)
    return loaded


def processor_key(processor: Any) -> str:
    """Equal for processors that make equal inputs."""
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is not None:
        return str(backend.to_str())
    return str(processor.to_dict() if hasattr(processor, "to_dict") else id(processor))


def get_data(config: RunConfig, task: Task, run: Run, score_only: bool = False) -> DataSplits:
    """Raw data with columns named by role."""
    if config.data.source is None:
        raise UsageProblem("no data given", hint="--data FOLDER, FILE, Hub id or shipped set")
    others = task.other_columns
    data = load_data(config.data, task.columns, task.optional_columns, run, others=others, score_only=score_only)
    run.provenance["data"] = data.provenance
    check_responses(config, data)
    return data


def relabel(data: DataSplits, loaded: Loaded, config: RunConfig, run: Run) -> None:
    """Renumber the data's classes as a model numbers them; compares names.

    Raises:
        DataProblem: the names differ and no mapping was asked for.
    """
    if data.labels is None:
        return
    model_labels = loaded.labels
    mapping = match_labels(data.labels, model_labels, config.data.label_map, f"'{loaded.ref}'")
    for rows in (data.train, data.validation, data.test):
        if rows is not None:
            rows.columns["label"] = mapping[np.asarray(rows.columns["label"])]
    generic = model_labels is None or all(name == f"LABEL_{i}" for i, name in enumerate(model_labels))
    if generic:
        run.reporter.info(f"'{loaded.ref}' does not name its classes: taken to be in the order of the data")
    data.labels = data.labels if generic else model_labels
    name_classes(loaded, data.labels or [])


def name_classes(loaded: Loaded, labels: Sequence[str]) -> None:
    """Write class names into a model's configuration."""
    model_config: Any = loaded.model.config
    model_config.id2label = dict(enumerate(labels))
    model_config.label2id = {name: i for i, name in enumerate(labels)}


def load_teacher(config: RunConfig, task: Task, data: DataSplits, run: Run) -> Loaded:
    """The teacher with its processor; a configuration file gives random weights to be fine-tuned."""
    reference = config.teacher.model
    assert reference is not None
    path = Path(reference).expanduser()
    if path.suffix == ".json" and path.is_file():
        return described(path, task, data, config, run)
    teacher = load_model(reference, task.auto_class, run, "teacher", data.labels if config.teacher.fine_tune else None)
    load_processor(teacher, task, run)
    return teacher


def check_trained(loaded: Loaded, what: str = "teacher") -> None:
    """Refuse a model whose head has never been trained.

    Raises:
        ModelProblem: part of the weights are new.
    """
    new = loaded.facts.get("new_weights")
    if new:
        hint = (
            "--fine-tune-teacher trains it on the data first" if what == "teacher" else "train it first: kdtool distill"
        )
        raise ModelProblem(
            f"{what} '{loaded.ref}' has no trained head for this task",
            why=f"new weights: {', '.join(new[:3])}",
            hint=hint,
        )


def check_same_classes(model: Loaded, teacher: Loaded) -> None:
    """Refuse to compare two models that number different classes.

    Raises:
        ModelProblem: they do.
    """
    if model.labels and teacher.labels and model.labels != teacher.labels:
        raise ModelProblem(
            f"'{model.ref}' and '{teacher.ref}' number different classes",
            why=f"{model.labels[:3]} against {teacher.labels[:3]}",
            hint="evaluate them one by one",
        )


def load_student(config: RunConfig, task: Task, data: DataSplits, teacher: Loaded | None, run: Run) -> Loaded:
    """The student: derived from the teacher, from a configuration file, or a model of its own.

    Raises:
        UsageProblem, ModelProblem: it cannot be had or does not fit.
    """
    reference = config.student.model
    lora.check(config.student)
    if reference is None:
        raise UsageProblem("no student given", hint="--student layers:N, a folder, a Hub id or a configuration file")
    path = Path(reference).expanduser()
    if reference.startswith("layers:"):
        if teacher is None:
            raise UsageProblem(f"--student {reference} needs a teacher", hint="name the model whose layers to take")
        student = from_layers(teacher, reference)
    elif path.suffix == ".json" and path.is_file():
        student = described(path, task, data, config, run, teacher)
    else:
        student = load_model(reference, task.auto_class, run, "student", data.labels)
        load_processor(student, task, run, teacher)
        if data.labels and not student.facts["new_weights"] and student.labels != data.labels:
            _check_student_labels(student, data.labels)
    if getattr(student.model, "quantized", False):
        raise ModelProblem(
            f"student '{reference}' cannot be trained: its weights are quantised", hint="train first, then quantize"
        )
    if config.student.init == "random" and student.facts["new_weights"] != ["all"]:
        layers = layers_of(student.model)
        student.model = type(student.model)(copy.deepcopy(student.model.config)).eval()
        if layers:
            install(student.model, layers, getattr(student.model.config, KEY)["module_pattern"])
        student.facts["new_weights"] = ["all"]
    if data.labels:
        name_classes(student, data.labels)
    lora.add(student, config.student, run)
    _freeze(student, config.student.freeze)
    return student


def _check_student_labels(student: Loaded, labels: list[str]) -> None:
    generic = [f"LABEL_{i}" for i in range(len(labels))]
    if student.labels not in (labels, generic):
        raise ModelProblem(
            f"student '{student.ref}' numbers other classes than the teacher",
            why=f"{(student.labels or ['none'])[:3]} against {labels[:3]}",
            hint="--set student.init=random starts without its weights",
        )


def _freeze(student: Loaded, patterns: Sequence[str]) -> None:
    """Mark parameters that never train.

    Raises:
        ConfigProblem: a pattern names nothing.
    """
    model: Any = student.model
    embeddings = {id(p) for n, p in model.named_parameters() if "embeddings." in n}
    embeddings |= {id(p) for p in model.get_input_embeddings().parameters()} if embeddings or patterns else set()
    for pattern in patterns:
        hit = False
        for name, parameter in student.model.named_parameters():
            named = id(parameter) in embeddings if pattern == "embeddings" else fnmatch.fnmatchcase(name, pattern)
            if named:
                parameter.requires_grad_(False)
                parameter.kept_frozen = True  # type: ignore[attr-defined] # read by the training loop
                hit = True
        if not hit:
            example = next(iter(dict(student.model.named_parameters())))
            raise ConfigProblem(
                f"student.freeze: '{pattern}' names no parameter",
                hint=f"embeddings, or a pattern for names such as {example}",
            )


@dataclass(slots=True)
class Encoded:
    """Model inputs of each split."""

    train: Examples | None
    validation: Examples | None
    test: Examples


def encode(
    task: Task, data: DataSplits, student: Loaded, teacher: Loaded | None, config: RunConfig, run: Run
) -> Encoded:
    """Encode each split for the student, and again for a teacher with another processor."""
    shared = teacher is None or processor_key(teacher.processor) == processor_key(student.processor)
    if teacher is not None and not shared:
        shared = task.shares_inputs(student, teacher)

    def one(rows: Examples | None) -> Examples | None:
        if rows is None:
            return None
        if not shared and teacher is not None and not task.classifies:
            return task.encode_apart(rows, student, teacher, config, run)
        made = task.encode(rows, student, config, run)
        if not shared and teacher is not None:
            prefix = f"{TEACHER_PREFIX}0."
            other = task.encode(rows, teacher, config, run, prefix)
            made.columns |= {prefix + key: value for key, value in other.columns.items() if key != "labels"}
        return made

    test = one(data.test)
    assert test is not None
    return Encoded(one(data.train), one(data.validation), test)


def is_head_of(model: Any) -> Any:
    """A predicate for parameter names (as in a method) that lie outside the pretrained body."""
    prefix = f"student.{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else None
    return lambda name: prefix is not None and not name.startswith(prefix)
