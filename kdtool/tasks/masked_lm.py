"""Masked language modelling: predict tokens that are hidden from the model, from both sides.

Each text is a row, a long one several. Some of its tokens are masked anew in each epoch, as a function
of seed, row and epoch; rows to score have masks that never change. A unit is one masked token.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from kdtool.data.examples import Examples
from kdtool.errors import DataProblem, ModelProblem
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.sections import AugmentSection, RunConfig
from kdtool.tasks._base import LABELS, Batch, Outputs
from kdtool.tasks._language import IGNORED, LanguageTask
from kdtool.tasks._masking import MaskedViews, Masks
from kdtool.tasks._text import longest, pad
from kdtool.tasks._views import Views

_ROW, _FREE = "row", "free"


class Task(LanguageTask):
    """Plain text through AutoModelForMaskedLM."""

    name: ClassVar[str] = "masked-lm"
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    processor_class: ClassVar[str] = "AutoTokenizer"
    columns: ClassVar[tuple[str, ...]] = ("text",)
    classifies: ClassVar[bool] = False
    writes: ClassVar[bool] = False

    def encode(self, rows: Examples, loaded: Loaded, config: RunConfig, run: Run, prefix: str = "") -> Examples:
        """Token ids of each text, long ones in parts, with the tokens that may be masked.

        Raises:
            DataProblem: no text is left, or teacher and student cut text differently.
            ModelProblem: the tokenizer has no mask token.
        """
        if prefix:
            raise DataProblem(
                "teacher and student have different tokenizers", hint="choose a student with the teacher's tokenizer"
            )
        tokenizer = loaded.processor
        if tokenizer.mask_token_id is None:
            raise ModelProblem(f"the tokenizer of '{loaded.ref}' has no mask token", hint="--task causal-lm")
        self.remember(loaded, config)
        special = np.array(tokenizer.all_special_ids, dtype=np.int64)
        ordinary = np.setdiff1d(np.arange(len(tokenizer)), special)
        self.masks = Masks(config.data.mask_share, int(tokenizer.mask_token_id), ordinary, config.augment.seed)
        encoded = tokenizer(
            list(rows.columns["text"]),
            truncation=True,
            max_length=longest(loaded, config.data.max_length),
            return_overflowing_tokens=True,
            return_attention_mask=False,
        )
        ids = [np.asarray(row, dtype=np.int64) for row in encoded["input_ids"]]
        free = [~np.isin(row, special) for row in ids]
        kept = [i for i in range(len(ids)) if free[i].any()]
        if not kept:
            raise DataProblem("the texts are empty", hint="choose another column: --set data.text=COLUMN")
        if len(kept) < len(ids):
            run.reporter.warn(f"{len(ids) - len(kept)} of {len(ids)} rows left out, which hold no known word")
        columns: dict[str, Any] = {"input_ids": [ids[i] for i in kept], _FREE: [free[i] for i in kept]}
        columns[_ROW] = np.arange(len(kept))
        return Examples(columns, np.array([len(ids[i]) for i in kept], dtype=np.int64))

    def views(self, rows: Examples, settings: AugmentSection) -> Views:
        """New masks in each epoch."""
        return MaskedViews(self.masks, self.masked, rows, settings)

    def collate(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad rows, with the masks of their first view."""
        return self.masked(items, [int(item[_ROW]) for item in items])

    def masked(self, items: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> Batch:
        """Pad rows with the masks of some views."""
        made = [self.masks(item["input_ids"], item[_FREE], number) for item, number in zip(items, numbers, strict=True)]
        ids, mask = pad([row for row, _ in made], self.padding)
        whole, _ = pad([item["input_ids"] for item in items], IGNORED)
        chosen, _ = pad([places for _, places in made], 0)
        return {"input_ids": ids, "attention_mask": mask, LABELS: whole.masked_fill(chosen == 0, IGNORED)}

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """Logits [units, vocabulary] and the tokens [units] behind the masks; of all tokens without labels."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask).logits
        if LABELS not in batch:
            return Outputs(logits[mask != 0], None)
        chosen = batch[LABELS] != IGNORED
        return Outputs(logits[chosen], batch[LABELS][chosen])

    def units(self, batch: Batch) -> Tensor:
        """Masked tokens of each row."""
        return torch.as_tensor((batch[LABELS] != IGNORED).sum(1))
