"""What a compressor gets and gives back, and the statistics that several of them need.

A compressor is a file with `Config` (a frozen dataclass of literal defaults), the literal `paper`, and

    compress(loaded, config, context) -> Loaded

It must leave the model it is given as it is. Further literals say more about it, each with a default:

    tasks = frozenset({...})   tasks whose models it takes (all)
    needs = "an encoder"       what models of other tasks lack
    trains = True              it trains on the rows (False)
    needs_data = True          it does not train, and cannot do without data either (False)
    trainable = False          training would undo it, so recovery comes before it (True)
    late = True                as a last stage it comes after recovery, which does not concern it (False)
    dials = {"keep": 0.05}     settings that a budget may turn (none): shares from 1, which is all, down to the
                               least, or ("int8", "int4"), names from the largest result to the smallest
    streams = True             it has `stream`, which works weight by weight (False)
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from kdtool.data.examples import Examples
from kdtool.derive import depth_of
from kdtool.errors import ModelProblem
from kdtool.lazy import State, held
from kdtool.modeling.compressed import KINDS, CompressedConfig, CompressedModel, compressed_config, make_compressed
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.sections import TrainSection
from kdtool.tasks._base import Batch, Task
from kdtool.tasks._views import Views

Linear: TypeAlias = Any
"""`nn.Linear`, or GPT-2's `Conv1D`, whose class is not typed."""


@dataclass(frozen=True, slots=True)
class Context:
    """What surrounds a compressor.

    Attributes:
        task: Runs the model.
        batches: Real inputs, for statistics and for comparing outputs, with labels where there are some; None
            without data.
        run: Context of the run.
        rows: Encoded training rows, for compressors that train or count; None where there are none.
        train: How to train on them; length and learning rates are the compressor's own.
        checkpoints: Where its checkpoints go; None for none.
        views: Makes altered rows to train on; None to train on the rows as they are.
        memo: Where a search lets a compressor keep what it found out about a model, by name; None elsewhere.
    """

    task: Task
    batches: Sequence[Batch] | None
    run: Run
    rows: Examples | None = None
    train: TrainSection = field(default_factory=TrainSection)
    checkpoints: Path | None = None
    views: Views | None = None
    memo: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """What `stream` gives: a model whose weights are still to be read or computed.

    Attributes:
        config: Configuration of the new model.
        state: Its weights.
        facts: What a report says of it.
        processor: The new tokenizer, where it is another one.
    """

    config: Any
    state: State
    facts: dict[str, Any] = field(default_factory=dict)
    processor: Any = None


def body_config(config: Any) -> Any:
    """The configuration of the transformer itself, where a model wraps one."""
    return getattr(config, "backbone_config", None) or config


def layers_of(loaded: Loaded) -> tuple[str, list[nn.Module]]:
    """Path of the module list that holds the layers, and the layers.

    Raises:
        ModelProblem: the architecture has no single stack of layers.
    """
    config: Any = loaded.model.config
    _, path = depth_of(config, loaded.model)
    return path, list(loaded.model.get_submodule(path).children())


def empty_model(loaded: Loaded, config: Any, context: Context | None = None) -> Any:
    """A model for a configuration that was made of a model's own; its weights are still to be loaded.

    The context names the task where the configuration states other forms.
    """
    if isinstance(config, CompressedConfig):
        assert context is not None
        return make_compressed(context.task.auto_class, config)
    with torch.random.fork_rng(devices=[]):
        return type(loaded.model)(config)


def skeleton(loaded: Loaded, config: Any, context: Context) -> Any:
    """Such a model on the device `meta`, to read shapes from."""
    with torch.device("meta"):
        return empty_model(loaded, config, context)


def rebuilt(loaded: Loaded, made: Made, context: Context | None = None) -> Loaded:
    """The model that a configuration and a state describe, in memory.

    Raises:
        ModelProblem: the weights are not of the shapes that the configuration states.
    """
    model = empty_model(loaded, made.config, context)
    missing = set(model.state_dict()) - set(made.state)
    try:
        found = model.load_state_dict({name: lazy.load() for name, lazy in made.state.items()}, strict=False)
    except RuntimeError as error:
        raise _misfit(loaded, str(error)) from None
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if found.unexpected_keys or missing - tied:
        raise _misfit(loaded, f"not to be placed: {[*found.unexpected_keys, *sorted(missing - tied)][0]}")
    model.tie_weights()
    if hasattr(loaded.model, "generation_config") and model.can_generate():
        model.generation_config = copy.deepcopy(loaded.model.generation_config)
    processor = loaded.processor if made.processor is None else made.processor
    return Loaded(model.eval(), processor, loaded.ref, None, None, carried(loaded, **made.facts))


def _misfit(loaded: Loaded, why: str) -> ModelProblem:
    return ModelProblem(
        f"'{loaded.ref}' cannot be cut this way: its configuration does not state such shapes",
        why=why.strip().rsplit("\n", 1)[-1].strip()[:300],
    )


Stream: TypeAlias = Callable[[Loaded, State, Any, Context], Made]


def in_memory(stream: Stream, loaded: Loaded, config: Any, context: Context) -> Loaded:
    """What a compressor that works weight by weight makes of a model in memory."""
    return rebuilt(loaded, stream(loaded, held(loaded.model.state_dict()), config, context), context)


def reformed(loaded: Loaded, config: Any, forms: Mapping[str, Mapping[str, Any]], context: Context) -> tuple[Any, str]:
    """A configuration with some modules in other forms, and the prefix that names of weights get by it.

    Args:
        loaded: The model as it is.
        config: Its configuration, or that of a smaller one.
        forms: Module path in it to its form; see `kdtool.modeling.compressed`.
        context: Gives the task.

    Raises:
        ModelProblem: the task has no models of such forms.
    """
    if context.task.auto_class not in KINDS:
        raise ModelProblem(f"'{loaded.ref}' cannot take such forms", why=f"its task is {context.task.name}")
    prefix = f"{CompressedModel.base_model_prefix}."
    inside = {path.removeprefix(prefix): spec for path, spec in forms.items()}
    wrapped = isinstance(loaded.model, CompressedModel)
    return compressed_config(config, inside), "" if wrapped else prefix


def renumber(batch: Batch, ids: Tensor) -> Batch:
    """A batch in the numbers of another vocabulary.

    Args:
        batch: With or without `input_ids`.
        ids: New number of each old token.
    """
    changed = {key: ids[batch[key]] for key in ("input_ids",) if key in batch}
    if "labels" in batch and batch["labels"].shape == batch.get("input_ids", torch.empty(0)).shape:
        kept = batch["labels"] >= 0
        changed["labels"] = torch.where(kept, ids[batch["labels"].clamp_min(0)], batch["labels"])
    return batch | changed


def known(context: Context, key: str, loaded: Loaded, find: Callable[[], Any]) -> Any:
    """What `find` gives, kept where a search asks for it again for the same model."""
    if context.memo is None:
        return find()
    of, found = context.memo.get(key, (None, None))
    if of is not loaded.model:
        found = find()
        context.memo[key] = (loaded.model, found)
    return found


def carried(loaded: Loaded, **facts: Any) -> dict[str, Any]:
    """Facts of a compressed model: its stored number format, trained weights, and what a compressor adds."""
    return {"new_weights": [], "dtype": loaded.facts.get("dtype", "float32"), **facts}


def matrix_of(module: Linear, weight: Tensor) -> Tensor:
    """A map's weights as [outputs, inputs]; a view, so that changes in place write through."""
    return weight.T if isinstance(module, Conv1D) else weight


def linear_parts(loaded: Loaded) -> dict[str, Linear]:
    """The linear maps of all layers, by path in the model."""
    path, layers = layers_of(loaded)
    return {f"{path}.{i}.{name}": part for i, layer in enumerate(layers) for name, part in linears(layer).items()}


def linears(module: nn.Module) -> dict[str, Linear]:
    """The linear maps inside a module, by path."""
    return {name: part for name, part in module.named_modules() if isinstance(part, (nn.Linear, Conv1D))}


@contextlib.contextmanager
def watching(modules: Mapping[str, nn.Module], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `note(NAME, inputs [tokens, width])` whenever one of the modules runs."""

    def hook(name: str) -> Any:
        return lambda _, args: note(name, args[0].detach().reshape(-1, args[0].shape[-1]))

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def divergence(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Mean Kullback-Leibler divergence of outputs [units, classes] from those before, in nats."""
    pairs = [(a.log_softmax(-1), b.log_softmax(-1)) for a, b in zip(before, after, strict=True)]
    total = sum(float((p.exp() * (p - q)).sum()) for p, q in pairs)
    return total / sum(len(p) for p, _ in pairs)


@torch.no_grad()
def loss_over(model: nn.Module, context: Context) -> float | None:
    """Mean cross-entropy of the batches, in nats; None where they have no labels."""
    model.eval()
    total, units = 0.0, 0
    for batch in context.batches or ():
        out = context.task.forward(model, batch)
        if out.labels is None:
            return None
        total += float(functional.cross_entropy(out.logits.float(), out.labels, reduction="sum"))
        units += len(out.logits)
    return total / units if units else None


@torch.no_grad()
def run_over(model: nn.Module, context: Context) -> list[Tensor]:
    """Logits [units, classes] of each batch, in float32; empty without data."""
    model.eval()
    return [context.task.forward(model, batch).logits.float() for batch in context.batches or ()]
