"""Models in and out: finding, checking, loading and saving them through transformers."""

import contextlib
import hashlib
import json
import logging
import pickle  # only its error is used
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from kdtool.errors import ModelProblem
from kdtool.hub import ModelRef, fetch_model
from kdtool.lazy import State, read
from kdtool.modeling.compressed import weights_of
from kdtool.patching.saving import FILE, KEY, restore
from kdtool.run import Run

transformers.utils.logging.disable_progress_bar()


@dataclass(slots=True)
class Loaded:
    """A model with all that belongs to it.

    Attributes:
        model: The network.
        processor: Tokenizer, image processor or feature extractor; None if the task needs none.
        ref: Where it came from, as the user wrote it.
        revision: Commit of a Hub model, else None.
        folder: Local folder of its files, else None.
    """

    model: nn.Module
    processor: Any
    ref: str
    revision: str | None = None
    folder: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def labels(self) -> list[str] | None:
        """Class names in id order, or None for models without classes."""
        names = getattr(self.model.config, "id2label", None)
        return [names[i] for i in range(len(names))] if names else None

    @property
    def parameters(self) -> int:
        """Number of parameters, shared ones counted once; a graph's come from its manifest."""
        return self.facts.get("parameters") or weights_of(self.model)


def weights_hash(model: nn.Module) -> str:
    """Hash of all weights as they are in memory."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        ModelProblem: it is missing or not JSON.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelProblem(f"'{name}' is no model folder", why="config.json is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelProblem(f"config.json of '{name}' is damaged", why=str(error)) from None
    if not isinstance(values, dict):
        raise ModelProblem(f"config.json of '{name}' is damaged", why="not a JSON object")
    return values


def check_weights(folder: Path, name: str, allow_pickle: bool) -> None:
    """Refuse folders without weights, and pickle weights unless allowed.

    Raises:
        ModelProblem: no weights, pickle only, or a shard that the index names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = _shards(index, name)
        outside = [shard for shard in sorted(shards) if Path(shard).name != shard]
        if outside:
            raise ModelProblem(f"the weight index of '{name}' names a file outside its folder", why=outside[0][:100])
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            raise ModelProblem(
                f"'{name}' is incomplete", why=f"missing {', '.join(missing[:3])}", hint="download it again"
            )
    if any(path.name != FILE for path in folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        if allow_pickle:
            return
        raise ModelProblem(
            f"'{name}' has only pickle weights, which can run code when loaded",
            hint="convert it to safetensors, or trust it with --allow-pickle (loaded weights-only)",
        )
    raise ModelProblem(
        f"'{name}' holds no weights",
        why="no .safetensors file",
        hint="to start from random weights: --student path/to/config.json",
    )


def _shards(index: Path, name: str) -> set[str]:
    """File names that a weight index lists.

    Raises:
        ModelProblem: it is no such index.
    """
    try:
        values = json.loads(index.read_text(encoding="utf-8"))
        shards = set(values["weight_map"].values())
        if not shards or not all(isinstance(shard, str) for shard in shards):
            raise TypeError("no names of files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelProblem(
            f"the weight index of '{name}' is damaged", hint="copy or download the model again"
        ) from None
    return shards


_OTHER_KIND = re.compile(
    r"Unrecognized configuration class <class '[\w.]*?(\w+?)(?:Config)?'> for this kind of AutoModel: (\w+)"
)


@contextlib.contextmanager
def plain_model_errors(name: str) -> Iterator[None]:
    """Turn what transformers and safetensors raise on bad folders into one clear line."""
    try:
        yield
    except SafetensorError as error:
        raise ModelProblem(
            f"weights of '{name}' are damaged", why=str(error), hint="copy or download the model again"
        ) from None
    except pickle.UnpicklingError:
        raise ModelProblem(
            f"pickle weights of '{name}' hold more than tensors",
            why="loading them could run code",
            hint="convert it to safetensors where you trust it",
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        first = str(error).strip().split("\n", 1)[0]
        if "trust_remote_code" in str(error):
            raise ModelProblem(
                f"'{name}' brings its own code", hint="read that code, then pass --trust-remote-code"
            ) from None
        kind = _OTHER_KIND.search(first)
        if kind is not None:
            raise ModelProblem(
                f"'{name}' is no model for this task",
                why=f"transformers has no {kind[2]} of its architecture, {kind[1]}",
                hint="name the task that teacher and student share with --task, or another model",
            ) from None
        raise ModelProblem(f"'{name}' cannot be loaded", why=first[:300]) from None


def auto_class(name: str) -> Any:
    """The Auto class called `name`, with kdtool's own architectures registered."""
    import kdtool.modeling  # noqa: F401 - registers on import

    return getattr(transformers, name)


def resolve(text: str, run: Run, what: str = "model") -> tuple[Path, str | None]:
    """Local folder and commit of a model reference; downloads Hub models."""
    ref = ModelRef.parse(text, what)
    if ref.folder is not None:
        return ref.folder, None
    folder, revision = fetch_model(ref, run)
    run.provenance.setdefault("models", {})[what] = {"id": ref.name, "revision": revision}
    return folder, revision


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back transformers' load reports; what matters is checked here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_model(text: str, auto: str, run: Run, what: str = "model", labels: Sequence[str] | None = None) -> Loaded:
    """Load a model through an Auto class, without its processor.

    Args:
        text: Folder or `id[@revision]`.
        auto: Name of the Auto class.
        run: Context; gives device, safety switches.
        what: Role for messages and provenance: teacher, student, model.
        labels: Class names; given to the model when its head does not have that many classes yet.

    Raises:
        ModelProblem, HubProblem: as the name says.
    """
    folder, revision = resolve(text, run, what)
    values = read_config(folder, text)
    check_weights(folder, text, run.allow_pickle)
    if (folder / "modules.json").is_file() and auto == "AutoModelForSequenceClassification":
        model, missing = _sentence_encoder(folder, text, labels or ["LABEL_0", "LABEL_1"]), ["classifier.weight"]
    else:
        model, missing = _load_auto(folder, text, auto, run, values, labels)
    model.float().eval()
    restore(model, folder, text)
    facts = {"new_weights": missing, "dtype": values.get("dtype") or values.get("torch_dtype") or "float32"}
    return Loaded(model, None, text, revision, folder, facts)


def load_skeleton(text: str, auto: str, run: Run) -> tuple[Loaded, State]:
    """A model without its weights, on the device `meta`, and the weights, to be read one by one.

    Args:
        text: Folder or `id[@revision]`.
        auto: Name of the Auto class.
        run: Context.

    Raises:
        ModelProblem: the folder's weights are not those that the architecture names.
    """
    folder, revision = resolve(text, run)
    values = read_config(folder, text)
    check_weights(folder, text, allow_pickle=False)
    state = read(folder, text)
    with plain_model_errors(text), _quiet(), torch.device("meta"):
        config = auto_class("AutoConfig").from_pretrained(folder, local_files_only=True)
        model = auto_class(auto).from_config(config).eval()
    if hasattr(config, KEY):
        raise ModelProblem(f"'{text}' has patched attention, which is not read tensor by tensor")
    config.architectures = values.get("architectures")
    fit(model, state, text)
    stored = values.get("dtype") or values.get("torch_dtype") or "float32"
    return Loaded(model, None, text, revision, folder, {"new_weights": [], "dtype": stored}), state


def fit(model: Any, state: State, ref: str) -> None:
    """Hold the names and shapes of a state against those that an architecture asks for.

    Raises:
        ModelProblem: they differ.
    """
    wanted = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    absent = [name for name in wanted if name not in state and name not in tied]
    wrong = [name for name, value in wanted.items() if name in state and state[name].shape != tuple(value.shape)]
    if absent or wrong or any(name not in wanted for name in state):
        odd = [*absent, *wrong, *(name for name in state if name not in wanted)]
        raise ModelProblem(
            f"the weights of '{ref}' are not named or shaped as its architecture asks",
            why=odd[0],
            hint="kdtool export MODEL --format safetensors, where there is memory for it, stores them anew",
        )


def _load_auto(
    folder: Path, text: str, auto: str, run: Run, values: dict[str, Any], labels: Sequence[str] | None
) -> tuple[Any, list[str]]:
    """`from_pretrained` with the head sized for `labels`; returns the model and its newly made weights."""
    extra: dict[str, Any] = {}
    has = len(values.get("id2label") or ()) or values.get("num_labels")
    headless = not any("For" in name for name in values.get("architectures") or [])
    if labels is not None and (headless or (has or 2) != len(labels)):
        extra = {
            "id2label": dict(enumerate(labels)),
            "label2id": {name: i for i, name in enumerate(labels)},
            "ignore_mismatched_sizes": True,
        }
    with plain_model_errors(text), _quiet():
        model, report = auto_class(auto).from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=run.trust_remote_code,
            weights_only=True,
            output_loading_info=True,
            dtype=torch.float32,
            **extra,
        )
    missing = sorted(report["missing_keys"]) + sorted(str(key[0]) for key in report.get("mismatched_keys", ()))
    return model, missing


def _sentence_encoder(folder: Path, text: str, labels: Sequence[str]) -> Any:
    """A sentence-transformers folder as a `SentenceClassifier` with a new head.

    Raises:
        ModelProblem: the folder pools otherwise than by the mean.
    """
    from kdtool.modeling import SentenceClassifier, SentenceClassifierConfig

    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    kinds = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in modules}
    pooling = (
        json.loads((folder / kinds["Pooling"] / "config.json").read_text(encoding="utf-8"))
        if "Pooling" in kinds
        else {}
    )
    if not pooling.get("pooling_mode_mean_tokens"):
        raise ModelProblem(
            f"sentence encoder '{text}' does not pool by the mean", hint="give a model with a classifier head"
        )
    with plain_model_errors(text), _quiet():
        backbone = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    backbone.config._name_or_path = ""  # a path of this machine, no part of the model
    config = SentenceClassifierConfig(
        backbone_config=backbone.config,
        normalize="Normalize" in kinds,
        logit_scale=20.0 if "Normalize" in kinds else 1.0,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    model = SentenceClassifier(config)
    wanted = model.encoder.state_dict()
    state = {key: value for key, value in backbone.state_dict().items() if key in wanted}
    model.encoder.load_state_dict(state)
    return model


def from_config_file(
    path: Path, auto: str, labels: Sequence[str] | None, more: Mapping[str, Any] | None = None
) -> Loaded:
    """A model with random weights, described by a configuration file.

    Args:
        path: The file.
        auto: Name of the Auto class.
        labels: Class names in id order.
        more: What the file leaves to the data, such as the number of inputs.

    Raises:
        ModelProblem: the file does not describe a model of this kind.
    """
    values = (
        read_config(path.parent if path.is_file() else path, str(path))
        if path.name == "config.json"
        else read_json(path)
    )
    kind = values.pop("model_type", None)
    if kind is None:
        raise ModelProblem(
            f"{path} does not say which architecture it describes", hint='add "model_type", such as "bert"'
        )
    values.pop("transformers_version", None)
    values |= more or {}
    if labels is not None:
        values |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    with plain_model_errors(str(path)):
        loader = auto_class(auto)
        model = loader.from_config(transformers.AutoConfig.for_model(kind, **values))
    return Loaded(model.eval(), None, str(path), None, path.parent, {"new_weights": ["all"], "dtype": "float32"})


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        ModelProblem: it holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelProblem(f"{path} is not JSON", why=str(error)) from None
    if not isinstance(values, dict):
        raise ModelProblem(f"{path} is not a JSON object")
    return values


def load(path_or_id: str | Path, task: str | None = None, run: Run | None = None) -> Any:
    """Load anything kdtool wrote, and anything transformers loads.

    Args:
        path_or_id: Folder, or Hub id with optional @revision.
        task: Task name; taken from config.json when absent.
        run: Context; offline, cache and safety switches (default: a plain one).

    Returns:
        The model, in eval mode and the stored number format.
    """
    from kdtool.registry import TASKS

    run = run or Run()
    folder, _ = resolve(str(path_or_id), run)
    values = read_config(folder, str(path_or_id))
    check_weights(folder, str(path_or_id), run.allow_pickle)
    auto = auto_class_of(values) if task is None else str(TASKS.info(task).facts["auto_class"])
    with plain_model_errors(str(path_or_id)), _quiet():
        model = auto_class(auto).from_pretrained(
            folder, local_files_only=True, trust_remote_code=run.trust_remote_code, weights_only=True, dtype="auto"
        )
    restore(model, folder, str(path_or_id))
    return model.eval()


def auto_class_of(values: dict[str, Any]) -> str:
    """The Auto class for the architecture that a config.json names."""
    endings = {
        "ForSequenceClassification": "AutoModelForSequenceClassification",
        "ForImageClassification": "AutoModelForImageClassification",
        "ForAudioClassification": "AutoModelForAudioClassification",
        "ForCausalLM": "AutoModelForCausalLM",
        "LMHeadModel": "AutoModelForCausalLM",
        "ForMaskedLM": "AutoModelForMaskedLM",
        "SentenceClassifier": "AutoModelForSequenceClassification",
    }
    for name in values.get("architectures") or []:
        for ending, auto in endings.items():
            if name.endswith(ending):
                # audio models name their classifier ...ForSequenceClassification, too
                if auto == "AutoModelForSequenceClassification" and values.get("model_type") in _AUDIO:
                    return "AutoModelForAudioClassification"
                return auto
        if name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values():
            # the ending ForConditionalGeneration is also that of models of images and speech
            return "AutoModel" if values.get("model_type") in _AUDIO else "AutoModelForSeq2SeqLM"
    return "AutoModel"


_AUDIO = frozenset(
    {
        "wav2vec2",
        "hubert",
        "wavlm",
        "unispeech",
        "unispeech-sat",
        "sew",
        "sew-d",
        "data2vec-audio",
        "whisper",
        "wav2vec2-conformer",
        "wav2vec2-bert",
    }
)
