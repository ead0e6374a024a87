"""Causal language modelling: predict each token from those before it.

Plain texts are joined, each with a beginning-of-sequence token in front (where the tokenizer has one),
and cut into windows of equal length, so nothing is padded; all tokens but the first of a window count.
Of prompts with responses, and of conversations, only the responses count; each is a row of its own,
padded on the right. With `data.packing` texts are rows of their own, too, cut where they are too long, and
rows share a line with others that they do not see. A unit is one predicted token that counts.
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
from kdtool.registry import METHODS
from kdtool.run import Run
from kdtool.sections import RunConfig
from kdtool.tasks._base import LABELS, TEACHER_PREFIX, Batch, Outputs, States
from kdtool.tasks._heads import body_of, has_plain_head
from kdtool.tasks._language import IGNORED, LanguageTask
from kdtool.tasks._packing import POSITIONS, examples_of, joined, keeps_apart, packable, padded_positions
from kdtool.tasks._prompts import COUNTED, documents, encode_prompts, has_prompts
from kdtool.tasks._spans import GROUPS, encode_apart
from kdtool.tasks._text import longest, pad

_WINDOW = 256
_LONGEST_ROW = 512


class Task(LanguageTask):
    """Texts, prompts with responses and conversations through AutoModelForCausalLM."""

    name: ClassVar[str] = "causal-lm"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    processor_class: ClassVar[str] = "AutoTokenizer"
    columns: ClassVar[tuple[str, ...]] = ("text",)
    other_columns: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt", "response"), ("messages",))
    optional_columns: ClassVar[tuple[str, ...]] = ("input",)
    classifies: ClassVar[bool] = False

    def encode(self, rows: Examples, loaded: Loaded, config: RunConfig, run: Run, prefix: str = "") -> Examples:
        """Windows [rows, window] of token ids, or rows of prompt and response with a mask of what counts.

        Raises:
            DataProblem: not even one window or row.
        """
        tokenizer = loaded.processor
        self.remember(loaded, config)
        if has_prompts(rows):
            limit = longest(loaded, config.data.max_length, default=_LONGEST_ROW)
            return encode_prompts(rows, tokenizer, config.data, limit, run)
        window = longest(loaded, config.data.max_length, default=_WINDOW)
        begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        encoded = tokenizer(list(rows.columns["text"]), add_special_tokens=False, return_attention_mask=False)
        if config.data.packing:
            return documents(encoded["input_ids"], begin, tokenizer.eos_token_id, window)
        stream = np.concatenate([np.array(begin + ids, dtype=np.int64) for ids in encoded["input_ids"]])
        count = len(stream) // window
        if count == 0:
            raise DataProblem(
                f"the text holds {len(stream)} tokens, fewer than one window of {window}",
                hint="more text, or --set data.max_length=N",
            )
        return Examples({"input_ids": stream[: count * window].reshape(count, window)})

    def encode_apart(self, rows: Examples, student: Loaded, teacher: Loaded, config: RunConfig, run: Run) -> Examples:
        """Rows of one text each in the tokens of both models, with the places where both can be compared.

        Raises:
            DataProblem: the method compares token with token.
        """
        name = config.method_name
        if config.command not in ("distill", "compare"):
            raise DataProblem("the two models have different tokenizers", hint="evaluate them one by one")
        if not METHODS.info(name).facts.get("other_tokenizers"):
            raise DataProblem(
                "teacher and student have different tokenizers",
                why=f"{name} compares token with token",
                hint="--method span-kd or uld compares texts; or choose a student with the teacher's tokenizer",
            )
        self.remember(student, config)
        self.others[0] = teacher.processor
        limits = [longest(loaded, config.data.max_length, default=_LONGEST_ROW) for loaded in (student, teacher)]
        return encode_apart(rows, [student.processor, teacher.processor], limits, config.data, run)

    def packed(self, rows: Examples, models: Sequence[nn.Module]) -> Examples | None:
        """Rows with the place of each token; None for windows, which are full, and where a model mixes examples."""
        if COUNTED not in rows.columns or GROUPS in rows.columns or not all(keeps_apart(model) for model in models):
            return None
        return packable(rows)

    def collate(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        """Stack windows; pad rows on the right, with labels of -100 where a token does not count."""
        if COUNTED not in items[0]:
            return {"input_ids": torch.from_numpy(np.stack([item["input_ids"] for item in items]))}
        rows = joined(items, ("input_ids", COUNTED, POSITIONS)) if POSITIONS in items[0] else items
        ids, mask = pad([row["input_ids"] for row in rows], self.padding)
        counted, _ = pad([row[COUNTED] for row in rows], 0)
        batch = {"input_ids": ids, "attention_mask": mask, LABELS: ids.masked_fill(counted == 0, IGNORED)}
        if rows is not items:
            positions, _ = pad([row[POSITIONS] for row in rows], 0)
            batch[POSITIONS] = padded_positions(positions, mask)
        return batch | self._beside(items) if GROUPS in items[0] else batch

    def _beside(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        """Inputs of a teacher with another tokenizer, and groups [groups, 5]: row, and tokens of both."""
        prefix = f"{TEACHER_PREFIX}0."
        own = [{key.removeprefix(prefix): item[key] for key in item if key.startswith(prefix)} for item in items]
        found = {prefix + key: value for key, value in self.collate(own).items()}
        rows = np.repeat(np.arange(len(items)), [len(item[GROUPS]) for item in items])
        found[GROUPS] = torch.from_numpy(np.c_[rows, np.concatenate([item[GROUPS] for item in items])])
        return found

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """Logits [units, vocabulary] and next tokens [units] of the tokens that count.

        All tokens but padding count in a batch without labels.
        """
        logits = model(**_inputs(batch)).logits[:, :-1]
        return Outputs(*_counted(batch, logits))

    def has_states(self, model: nn.Module) -> bool:
        """Whether the logits are those of the output embedding, tried on a few tokens."""
        return has_plain_head(model)

    def states(self, model: nn.Module, batch: Batch) -> States:
        """Last hidden states before the tokens that count, and these."""
        hidden = body_of(model)(**_inputs(batch)).last_hidden_state[:, :-1]
        chosen, labels = _counted(batch, hidden)
        return States(chosen, head_of(model), labels)

    def prompt_of(self, row: Mapping[str, Any]) -> np.ndarray:
        """The tokens before the first that counts."""
        ids: np.ndarray = row["input_ids"]
        return ids[: int(row[COUNTED].argmax())]

    def units(self, batch: Batch) -> Tensor:
        """Counted tokens of each example."""
        following = _following(batch)
        ids = batch["input_ids"]
        if following is not None and POSITIONS in batch:
            owners = examples_of(batch)
            return torch.bincount(owners[:, 1:][following != IGNORED], minlength=int(owners.max()) + 1)
        if following is None:
            return torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
        return (following != IGNORED).sum(1)


def _inputs(batch: Batch) -> dict[str, Any]:
    """What a model is called with."""
    # transformers tells packed examples apart by their positions, where it is given no mask
    key = POSITIONS if POSITIONS in batch else "attention_mask"
    given = {key: batch[key]} if key in batch else {}
    return {"input_ids": batch["input_ids"], "use_cache": False, **given}


def _counted(batch: Batch, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values [units, ...] of those [rows, n - 1, ...] that stand before a token that counts, and these tokens."""
    following = _following(batch)
    if following is None:
        return values.flatten(0, 1), batch["input_ids"][:, 1:].reshape(-1)
    chosen = following != IGNORED
    return values[chosen], following[chosen]


def _following(batch: Batch) -> Tensor | None:
    """What comes after each token but the last, -100 where it does not count; None where all of them do."""
    if LABELS in batch:
        return batch[LABELS][:, 1:]
    if "attention_mask" in batch:
        return batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, IGNORED)
    return None
