"""LoRA: train low-rank additions to a student's layers, and merge them at the end.

Hu et al.: LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv:2106.09685. The layers are
those of peft, put into the model in its place, so that it keeps its class, its paths and its body and
every method takes it as it is.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from kdtool.errors import ConfigProblem, UsageProblem
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.sections import StudentSection

ADAPTER = "adapter"
"""Folder of the output that holds the additions by themselves."""

_MARK = "lora_"
_PREFIX = "base_model.model."  # what peft writes before the names of a model's own modules
_ALL = "all-linear"


@contextlib.contextmanager
def _peft() -> Iterator[Any]:
    """The library, imported where it is needed: its import takes seconds.

    Raises:
        UsageProblem: it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import peft
        except ModuleNotFoundError as error:
            raise UsageProblem(
                "student.lora_rank needs peft", why=str(error), hint="pip install 'kdtool[lora]'"
            ) from None
        yield peft


def check(settings: StudentSection) -> None:
    """Refuse settings that do not go together, before anything is loaded.

    Raises:
        UsageProblem: settings of LoRA without a rank, or an adapter of a student that is nowhere saved.
    """
    if settings.lora_rank is None:
        given = [name for name in ("lora_alpha", "lora_targets", "lora_adapter") if getattr(settings, name)]
        if given:
            raise UsageProblem(f"student.{given[0]} needs student.lora_rank", hint="--set student.lora_rank=8")
        return
    reference = settings.model or ""
    if settings.lora_adapter and (reference.startswith("layers:") or reference.endswith(".json")):
        raise UsageProblem(
            f"student.lora_adapter: no other place has the student '{reference}' that an adapter could be put onto",
            hint="leave it out: the output holds the merged student",
        )


def add(loaded: Loaded, settings: StudentSection, run: Run) -> None:
    """Put trainable additions into a student and freeze the rest, but for weights that are new.

    Args:
        loaded: The student.
        settings: Rank, scale and layers; nothing happens without a rank.
        run: Hears how much trains.

    Raises:
        UsageProblem: peft is missing, or the student has no weights to add to.
        ConfigProblem: `lora_targets` names no layer.
    """
    if settings.lora_rank is None:
        return
    new = list(loaded.facts.get("new_weights") or ())
    if new == ["all"]:
        raise UsageProblem(
            "student.lora_rank adds to trained weights, and the student's are random",
            hint="leave student.lora_rank out",
        )
    anything: Any = loaded.model
    with _peft() as peft:
        wish = peft.LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,
            target_modules=settings.lora_targets or _ALL,
            exclude_modules=sorted({name.rpartition(".")[0] for name in new}) or None,
        )
        try:
            peft.inject_adapter_in_model(wish, anything)
        except ValueError as error:
            why = " ".join(str(error).split())[:200]
            raise ConfigProblem(
                f"student.lora_targets: nothing to add to in '{loaded.ref}'",
                why=why,
                hint="names of linear layers, such as [q_proj, v_proj]",
            ) from None
    trained = 0
    for name, parameter in anything.named_parameters():
        trains = _MARK in name or name in new
        parameter.requires_grad_(trains)
        parameter.kept_frozen = not trains  # read by the training loop
        trained += parameter.numel() if trains else 0
    run.reporter.info(f"LoRA of rank {settings.lora_rank}: {trained:,} of {loaded.parameters:,} parameters train")


def save_adapter(model: nn.Module, reference: str, revision: str | None, folder: Path) -> None:
    """Write the additions by themselves, as peft loads them onto the student they were made for.

    Args:
        model: The trained student, not merged yet.
        reference: Where that student came from.
        revision: Its commit, for a model of the Hub.
        folder: Is made.
    """
    anything: Any = model
    with _peft() as peft:
        wish = anything.peft_config["default"]
        wish.base_model_name_or_path, wish.revision, wish.inference_mode = reference, revision, True
        found = peft.get_peft_model_state_dict(anything, save_embedding_layers=False)
        folder.mkdir(parents=True, exist_ok=True)
        wish.save_pretrained(folder)
    tensors = {_PREFIX + name: value.detach().cpu().contiguous() for name, value in found.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def merge(model: nn.Module) -> None:
    """Add the additions to the layers they belong to, in place; the model is a plain one then."""
    if not hasattr(model, "peft_config"):
        return
    with _peft() as peft:
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    for name, layer in layers:
        layer.merge(safe_merge=True)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer.get_base_layer())
    del model.peft_config
