"""Text classification: one sentence or a pair of sentences, one class."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from kdtool.data.examples import Examples
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.sections import RunConfig
from kdtool.tasks._base import LABELS, Batch
from kdtool.tasks._classification import ClassificationTask
from kdtool.tasks._text import longest, pad, padding_id


class Task(ClassificationTask):
    """Sentences and pairs of sentences through AutoModelForSequenceClassification."""

    name: ClassVar[str] = "text-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    processor_class: ClassVar[str] = "AutoTokenizer"
    columns: ClassVar[tuple[str, ...]] = ("text", "label")
    optional_columns: ClassVar[tuple[str, ...]] = ("text_pair",)
    default_lr: ClassVar[float] = 1e-4

    def __init__(self) -> None:
        self.padding: dict[str, int] = {}

    def encode(self, rows: Examples, loaded: Loaded, config: RunConfig, run: Run, prefix: str = "") -> Examples:
        """Token ids of each row, cut to the longest length the model takes."""
        tokenizer = loaded.processor
        self.padding[prefix] = padding_id(tokenizer)
        pair = rows.columns.get("text_pair")
        encoded = tokenizer(
            list(rows.columns["text"]),
            None if pair is None else list(pair),
            truncation=True,
            max_length=longest(loaded, config.data.max_length),
            return_attention_mask=False,
        )
        columns: dict[str, Any] = {"input_ids": [np.asarray(ids, dtype=np.int64) for ids in encoded["input_ids"]]}
        if pair is not None and "token_type_ids" in encoded:
            columns["token_type_ids"] = [np.asarray(ids, dtype=np.int64) for ids in encoded["token_type_ids"]]
        lengths = np.array([len(ids) for ids in columns["input_ids"]], dtype=np.int64)
        if "label" in rows.columns:
            columns[LABELS] = np.asarray(rows.columns["label"], dtype=np.int64)
        return Examples(columns, lengths)

    def stack(self, prefix: str, items: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad to the longest row of the batch."""
        ids, mask = pad([item["input_ids"] for item in items], self.padding[prefix])
        batch = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in items[0]:
            batch["token_type_ids"] = pad([item["token_type_ids"] for item in items], 0)[0]
        return batch
