"""Sequence-to-sequence modelling: an encoder reads the prompt, a decoder writes the response.

A row is a prompt with a response; both end as the tokenizer ends them, and the decoder begins with the
model's own token. A unit is one token of a response.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from kdtool.data.examples import Examples
from kdtool.divergences import head_of
from kdtool.errors import DataProblem
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.sections import RunConfig
from kdtool.tasks._base import LABELS, Batch, Outputs, States
from kdtool.tasks._heads import decoded, has_plain_head
from kdtool.tasks._language import IGNORED, LanguageTask
from kdtool.tasks._prompts import REFERENCE, asked
from kdtool.tasks._text import longest, pad
from kdtool.tasks._writing import decoder_start


class Task(LanguageTask):
    """Prompts and responses through AutoModelForSeq2SeqLM."""

    name: ClassVar[str] = "seq2seq-lm"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    processor_class: ClassVar[str] = "AutoTokenizer"
    columns: ClassVar[tuple[str, ...]] = ("prompt", "response")
    optional_columns: ClassVar[tuple[str, ...]] = ("input",)
    classifies: ClassVar[bool] = False

    def encode(self, rows: Examples, loaded: Loaded, config: RunConfig, run: Run, prefix: str = "") -> Examples:
        """Token ids of prompts and responses, each at most as long as the model takes.

        Raises:
            DataProblem: no row is left, or teacher and student cut text differently.
            ModelProblem: the model does not say what its decoder begins with.
        """
        if prefix:
            raise DataProblem(
                "teacher and student have different tokenizers", hint="choose a student with the teacher's tokenizer"
            )
        self.remember(loaded, config)
        limit = longest(loaded, config.data.max_length)
        tokenizer, start = loaded.processor, decoder_start(loaded.model)
        end = tokenizer.eos_token_id
        prompts = tokenizer(asked(rows, config.data.separator), return_attention_mask=False, verbose=False)["input_ids"]
        answers = list(rows.columns["response"])
        found = tokenizer(text_target=answers, return_attention_mask=False, verbose=False)["input_ids"]
        responses = [_ended(ids, end) for ids in found]
        cut = config.data.long_prompts == "cut"
        kept = [i for i, ids in enumerate(prompts) if ids and responses[i] and (cut or len(ids) <= limit)]
        self._report(len(prompts), len(kept), sum(len(responses[i]) > limit for i in kept), limit, run)
        columns: dict[str, list[Any]] = {"input_ids": [], "decoder_input_ids": [], LABELS: []}
        for i in kept:
            target = responses[i][:limit]
            columns["input_ids"].append(_cut(prompts[i], limit))
            columns["decoder_input_ids"].append(np.array([start, *target[:-1]], dtype=np.int64))
            columns[LABELS].append(np.array(target, dtype=np.int64))
        columns[REFERENCE] = [answers[i] for i in kept]
        both = zip(columns["input_ids"], columns[LABELS], strict=True)
        return Examples(columns, np.array([len(prompt) + len(target) for prompt, target in both], dtype=np.int64))

    @staticmethod
    def _report(count: int, kept: int, cut: int, limit: int, run: Run) -> None:
        if not kept:
            raise DataProblem(
                f"none of {count} rows can be used",
                why=f"prompts are empty or longer than {limit} tokens, or there is no response",
                hint="--set data.long_prompts=cut, or a larger data.max_length",
            )
        if kept < count:
            run.reporter.warn(
                f"{count - kept} of {count} rows left out, whose prompts are empty or over {limit} tokens"
            )
        if cut:
            run.reporter.info(f"{cut} of {kept} responses cut on the right at {limit} tokens")

    def collate(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad prompts and responses on the right."""
        ids, mask = pad([item["input_ids"] for item in items], self.padding)
        inputs, real = pad([item["decoder_input_ids"] for item in items], self.padding)
        labels, _ = pad([item[LABELS] for item in items], IGNORED)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": inputs,
            "decoder_attention_mask": real,
            LABELS: labels,
        }

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """Logits [units, vocabulary] and tokens [units] of the responses."""
        inputs = {key: value for key, value in batch.items() if key in _INPUTS}
        logits = model(**inputs, use_cache=False).logits
        chosen = batch["decoder_attention_mask"] != 0
        return Outputs(logits[chosen], batch[LABELS][chosen] if LABELS in batch else None)

    def has_states(self, model: nn.Module) -> bool:
        """Whether the logits are those of the output embedding, tried on a few tokens."""
        return has_plain_head(model)

    def states(self, model: nn.Module, batch: Batch) -> States:
        """The decoder's last hidden states at the tokens of the responses, and these."""
        ids, mask, inputs, real = (batch[name] for name in _INPUTS)
        anything: Any = model
        seen = anything.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden = decoded(model, inputs, real, seen, mask)
        chosen = real != 0
        return States(hidden[chosen], head_of(model), batch[LABELS][chosen])

    def lines(self, batch: Batch) -> Batch:
        """What decoders read and write: the token that they begin with, which does not count, and the response."""
        start, labels, real = batch["decoder_input_ids"][:, :1], batch[LABELS], batch["decoder_attention_mask"]
        return {
            "input_ids": torch.cat([start, labels.masked_fill(real == 0, self.padding)], 1),
            "attention_mask": torch.cat([torch.ones_like(start), real], 1),
            LABELS: torch.cat([torch.full_like(start, IGNORED), labels], 1),
        }

    def units(self, batch: Batch) -> Tensor:
        """Tokens of each response."""
        return batch["decoder_attention_mask"].sum(1)

    def prompt_of(self, row: Mapping[str, Any]) -> np.ndarray:
        """What the encoder reads."""
        ids: np.ndarray = row["input_ids"]
        return ids


_INPUTS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")


def _ended(ids: Sequence[int], end: int | None) -> list[int]:
    """A response with its end."""
    return [*ids] if end is None or (ids and ids[-1] == end) else [*ids, end]


def _cut(ids: Sequence[int], limit: int) -> np.ndarray:
    """A prompt cut in front of its last token, which ends it."""
    return np.array(ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]], dtype=np.int64)
