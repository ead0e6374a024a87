"""Causal language modelling: predict each token from those before it.

Plain texts are joined, each with a beginning-of-sequence token in front (where the tokenizer has one),
and cut into windows of equal length, so nothing is padded; all tokens but the first of a window count.
Of prompts with responses, and of conversations, only the responses count; each is a row of its own,
padded on the right. A unit is one predicted token that counts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from kdtool.config import RunConfig
from kdtool.data.examples import Examples
from kdtool.errors import DataProblem
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.tasks._base import LABELS, Batch, Outputs
from kdtool.tasks._language import IGNORED, LanguageTask
from kdtool.tasks._prompts import COUNTED, encode_prompts, has_prompts
from kdtool.tasks._text import longest, pad, padding_id

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

    def __init__(self) -> None:
        self.padding = 0

    def encode(self, rows: Examples, loaded: Loaded, config: RunConfig, run: Run, prefix: str = "") -> Examples:
        """Windows [rows, window] of token ids, or rows of prompt and response with a mask of what counts.

        Raises:
            DataProblem: not even one window or row, or teacher and student cut text differently.
        """
        if prefix:
            raise DataProblem(
                "teacher and student have different tokenizers", hint="choose a student with the teacher's tokenizer"
            )
        tokenizer = loaded.processor
        self.padding = padding_id(tokenizer)
        if has_prompts(rows):
            limit = longest(loaded, config.data.max_length, default=_LONGEST_ROW)
            return encode_prompts(rows, tokenizer, config.data, limit, run)
        window = longest(loaded, config.data.max_length, default=_WINDOW)
        begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        encoded = tokenizer(list(rows.columns["text"]), add_special_tokens=False, return_attention_mask=False)
        stream = np.concatenate([np.array(begin + ids, dtype=np.int64) for ids in encoded["input_ids"]])
        count = len(stream) // window
        if count == 0:
            raise DataProblem(
                f"the text holds {len(stream)} tokens, fewer than one window of {window}",
                hint="more text, or --set data.max_length=N",
            )
        return Examples({"input_ids": stream[: count * window].reshape(count, window)})

    def collate(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        """Stack windows; pad rows on the right, with labels of -100 where a token does not count."""
        if COUNTED not in items[0]:
            return {"input_ids": torch.from_numpy(np.stack([item["input_ids"] for item in items]))}
        ids, mask = pad([item["input_ids"] for item in items], self.padding)
        counted, _ = pad([item[COUNTED] for item in items], 0)
        return {"input_ids": ids, "attention_mask": mask, LABELS: ids.masked_fill(counted == 0, IGNORED)}

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """Logits [units, vocabulary] and next tokens [units] of the tokens that count.

        All tokens but padding count in a batch without labels.
        """
        ids = batch["input_ids"]
        inputs = {"attention_mask": batch["attention_mask"]} if "attention_mask" in batch else {}
        logits = model(input_ids=ids, use_cache=False, **inputs).logits[:, :-1]
        following = _following(batch)
        if following is None:
            return Outputs(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
        chosen = following != IGNORED
        return Outputs(logits[chosen], following[chosen])

    def units(self, batch: Batch) -> Tensor:
        """Counted tokens of each row."""
        following = _following(batch)
        ids = batch["input_ids"]
        if following is None:
            return torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
        return (following != IGNORED).sum(1)


def _following(batch: Batch) -> Tensor | None:
    """What comes after each token but the last, -100 where it does not count; None where all of them do."""
    if LABELS in batch:
        return batch[LABELS][:, 1:]
    if "attention_mask" in batch:
        return batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, IGNORED)
    return None
