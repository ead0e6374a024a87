"""Greedy texts for evaluation: batches of prompts, padded on the left, with key/value caches.

What a row gets does not depend on the rows beside it: prompts of like length stand together, and how much
may be written is a matter of the row alone.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from kdtool.data.batching import ordered_batches
from kdtool.errors import ModelProblem, UsageProblem
from kdtool.run import Run
from kdtool.tasks._text import padding_id

_KEPT = ("bos_token_id", "forced_bos_token_id", "forced_decoder_ids")
"""What of a model's own settings belongs to its form; penalties, beams and sampling do not."""


@dataclass(frozen=True, slots=True)
class Writing:
    """Settings.

    Attributes:
        longest: Most tokens of a text.
        stop: Strings that end a text, and are no part of it.
    """

    longest: int = 128
    stop: tuple[str, ...] = ()


class _Stops:
    """Rows that have written one of some strings are done."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], start: int) -> None:
        self.tokenizer, self.stop, self.start = tokenizer, stop, start
        # a token may hold no letter at all, so look at more tokens than a string has letters
        self.window = 8 + max(map(len, stop))

    def __call__(self, ids: Tensor, scores: Any, **more: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(ids[:, max(self.start, ids.shape[1] - self.window) :])
        return torch.tensor([any(end in text for end in self.stop) for text in texts], device=ids.device)


@torch.no_grad()
def write(
    model: nn.Module, tokenizer: Any, prompts: Sequence[np.ndarray], settings: Writing, batch_size: int, run: Run
) -> list[str]:
    """The most likely text behind each prompt, token by token.

    Args:
        model: A causal model, or one with an encoder, which reads the prompt.
        tokenizer: Of the model.
        prompts: Token ids of each prompt; an empty one gets an empty text.
        settings: Length and ends.
        batch_size: Prompts at a time; does not change the result.
        run: Gives the device, hears of progress.

    Raises:
        UsageProblem: the model cannot write, as a graph cannot.
    """
    anything: Any = model
    if not hasattr(anything, "generate"):
        raise UsageProblem(
            "metrics of texts need a model that writes, and an exported graph does not",
            hint="score the model it was exported from, or ask for --metrics loss",
        )
    causal = not anything.config.is_encoder_decoder
    ends = ends_of(anything, tokenizer)
    rooms = _rooms(anything, prompts, settings.longest, causal)
    texts = [""] * len(prompts)
    done, before = 0, anything.generation_config
    start = None if causal else decoder_start(anything)
    anything.generation_config = _greedy(before, tokenizer, ends, start)
    model.eval()
    try:
        for room, chosen in _batches(prompts, rooms, batch_size):
            if room > 0:
                written = _batch(anything, tokenizer, [prompts[i] for i in chosen], room, settings.stop, causal)
                for i, ids in zip(chosen, written, strict=True):
                    texts[i] = _text(tokenizer, ids, ends, settings.stop)
            done += len(chosen)
            run.reporter.progress("writing", done, len(prompts), {})
    finally:
        anything.generation_config = before
    return texts


def _batches(prompts: Sequence[np.ndarray], rooms: np.ndarray, size: int) -> Iterator[tuple[int, list[int]]]:
    """How much may be written, and row numbers of prompts of like length for which that is so."""
    for room in sorted(set(rooms.tolist()), reverse=True):
        rows = np.flatnonzero(rooms == room)
        for part in ordered_batches(np.array([len(prompts[int(i)]) for i in rows]), len(rows), size):
            yield room, rows[part].tolist()


def _rooms(model: Any, prompts: Sequence[np.ndarray], longest: int, causal: bool) -> np.ndarray:
    """How many tokens may follow each prompt, which takes part of a causal model's positions."""
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    positions = getattr(model.config, "max_position_embeddings", None)
    rooms = np.full(len(prompts), longest if positions is None else min(longest, positions))
    if causal and positions is not None:
        rooms = np.minimum(rooms, positions - lengths)
    return np.where(lengths > 0, rooms, 0)


def decoder_start(model: Any) -> int:
    """Id of the token that a decoder begins with.

    Raises:
        ModelProblem: neither the configuration nor the settings of generation name one.
    """
    for place in (model.config, model.generation_config):
        value = getattr(place, "decoder_start_token_id", None)
        if value is not None:
            return int(value)
    raise ModelProblem(
        f"{type(model).__name__} does not say what its decoder begins with",
        hint='add "decoder_start_token_id" to its config.json (the padding token of T5)',
    )


def opening(model: Any) -> list[int]:
    """Ids that every text of a decoder with an encoder begins with: its start, and what its settings force behind it.

    Raises:
        ModelProblem: the model does not say what its decoder begins with.
    """
    forced = getattr(model.generation_config, "forced_bos_token_id", None)
    return [decoder_start(model), *([] if forced is None else [int(forced)])]


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a text: the tokenizer's, and those the model names, such as the end of a turn."""
    named = model.generation_config.eos_token_id
    found = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(int(value) for value in found if value is not None))


def _greedy(before: Any, tokenizer: Any, ends: Sequence[int], start: int | None) -> Any:
    """Settings of greedy generation with nothing else of a model's habits."""
    kept = {name: value for name in _KEPT if (value := getattr(before, name, None)) is not None}
    ids = {"eos_token_id": list(ends) or None, "pad_token_id": padding_id(tokenizer), "decoder_start_token_id": start}
    return transformers.GenerationConfig(do_sample=False, num_beams=1, **ids, **kept)


def _batch(
    model: Any, tokenizer: Any, prompts: Sequence[np.ndarray], room: int, stop: Sequence[str], causal: bool
) -> list[np.ndarray]:
    """Ids written behind each prompt."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), padding_id(tokenizer))
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), None) if causal else slice(len(prompt))
        ids[row, place], mask[row, place] = torch.from_numpy(prompt), 1
    start = width if causal else 1  # a decoder begins with a token of its own
    settings = copy.copy(model.generation_config)
    settings.max_new_tokens = room
    found = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=settings,
        stopping_criteria=[_Stops(tokenizer, stop, start)] if stop else None,
    )
    return [np.asarray(row) for row in found[:, start:].cpu().numpy()]


def _text(tokenizer: Any, ids: np.ndarray, ends: Sequence[int], stop: Sequence[str]) -> str:
    """What was written before its end."""
    over = np.flatnonzero(np.isin(ids, list(ends)))
    text: str = tokenizer.decode(ids[: over[0]] if len(over) else ids, skip_special_tokens=True)
    for end in stop:
        text = text.partition(end)[0]
    return text.strip()
