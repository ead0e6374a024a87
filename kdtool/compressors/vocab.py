"""Drop tokens that the data does not use, from the tokenizer and from the tables of the model."""

import copy
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kdtool.compressors import _tokenizer
from kdtool.compressors._base import Context, Made, in_memory, skeleton
from kdtool.errors import ModelProblem, UsageProblem
from kdtool.lazy import Lazy, State
from kdtool.models import Loaded

paper = "Abdaoui, Pradel, Sigel: Load What You Need: Smaller Versions of Multilingual BERT, 2020, arXiv:2010.05609"
tasks = frozenset({"text-classification", "causal-lm", "masked-lm"})
needs = "a vocabulary"
needs_data = True
streams = True
dials = {"keep": 0.02}
late = True


@dataclass(frozen=True)
class Config:
    """Settings."""

    min_count: Annotated[int, Field(ge=0)] = 1
    """How often a token must be in the training rows to stay."""
    keep: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of those tokens to keep, the ones seen most often, above 0 and at most 1."""
    size: Annotated[int, Field(gt=0)] | None = None
    """Largest vocabulary, with all that must stay; wins over keep."""


def _kept(spec: _tokenizer.Spec, config: Config, context: Context) -> tuple[list[int], int]:
    """Tokens that stay, by rising number, and how many the rows use.

    Raises:
        UsageProblem: there is no room for those that must stay.
    """
    assert context.rows is not None
    ids = context.rows.columns["input_ids"]
    counts = np.bincount(np.concatenate([np.asarray(row).reshape(-1) for row in ids]))
    stay, names = _tokenizer.needed(spec), _tokenizer.tokens_of(spec)
    limit = len(names) if config.size is None else config.size
    if len(stay) > limit:
        raise UsageProblem(
            f"vocab: size={limit} has no room for the {len(stay)} special tokens, characters and bytes",
            why="without them some texts could not be encoded",
        )
    order = np.argsort(-counts, kind="stable")
    known = set(names.values())
    chosen = [int(i) for i in order if counts[i] >= max(1, config.min_count) and int(i) in known]
    if config.size is None:
        chosen = chosen[: max(1, round(config.keep * len(chosen)))]
    kept = _tokenizer.closed(chosen, _tokenizer.parts_of(spec), limit, stay)
    return sorted(kept), len(chosen)


def _holder(config: Any) -> Any:
    """The (sub-)configuration that states the size of the vocabulary."""
    for one in (config, getattr(config, "backbone_config", None), getattr(config, "text_config", None)):
        if one is not None and isinstance(getattr(one, "vocab_size", None), int):
            return one
    raise ModelProblem("vocab: the configuration does not state the size of a vocabulary")


def renumber_config(config: Any, numbers: dict[int, int]) -> None:
    """Give the special tokens of a configuration their new numbers; those that are gone become none."""
    for key, value in list(vars(config).items()):
        if not key.endswith(("_token_id", "_token_ids")):
            continue
        if isinstance(value, int):
            setattr(config, key, numbers.get(value))
        elif isinstance(value, list) and all(isinstance(item, int) for item in value):
            setattr(config, key, [numbers[item] for item in value if item in numbers])


def _rows(lazy: Lazy, ids: Tensor, shape: tuple[int, ...]) -> Lazy:
    return lazy.then(lambda value: value.index_select(0, ids), shape)


def stream(loaded: Loaded, state: State, config: Config, context: Context) -> Made:
    """The model with a smaller vocabulary, weight by weight.

    What it gives for texts all of whose tokens stay is what it gave; `facts["ids"]` [old size] says the new
    number of each old token, that of the unknown token for those that are gone.

    Raises:
        UsageProblem: there is no data, or no room for what must stay.
        ModelProblem: the model has no vocabulary, or its tokenizer cannot be trimmed.
    """
    if context.rows is None:
        raise UsageProblem("vocab looks at which tokens the training rows of the data use", hint="add --data DATA")
    spec = _tokenizer.read_spec(loaded.processor, loaded.ref)
    kept, seen = _kept(spec, config, context)
    changed = copy.deepcopy(loaded.model.config)
    holder = _holder(changed)
    before = int(holder.vocab_size)
    if kept[-1] >= before:
        raise ModelProblem(f"vocab: the tokenizer of '{loaded.ref}' knows more tokens than the model")
    numbers = {old: new for new, old in enumerate(kept)}
    holder.vocab_size = len(kept)
    for part in {id(changed): changed, id(holder): holder}.values():
        renumber_config(part, numbers)
    wanted = {name: tuple(value.shape) for name, value in skeleton(loaded, changed, context).state_dict().items()}
    rows = torch.tensor(kept)
    made = {
        name: lazy if wanted[name] == lazy.shape else _rows(lazy, rows, wanted[name]) for name, lazy in state.items()
    }
    unknown = loaded.processor.unk_token_id
    ids = torch.full((before,), numbers.get(unknown, 0) if unknown is not None else 0)
    ids[rows] = torch.arange(len(kept))
    facts = {"vocabulary": {"before": before, "after": len(kept), "used": seen}, "ids": ids, "kept": rows}
    processor = _tokenizer.with_spec(loaded.processor, _tokenizer.trim(spec, numbers), numbers)
    return Made(changed, made, facts, processor)


def compress(loaded: Loaded, config: Config, context: Context) -> Loaded:
    """The model with a smaller vocabulary; see `stream`."""
    made = in_memory(stream, loaded, config, context)
    model: Any = made.model
    if model.can_generate():
        old = made.facts["kept"].tolist()
        renumber_config(model.generation_config, {token: new for new, token in enumerate(old)})
    return made
