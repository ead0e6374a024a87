"""Tabular classification: one row of numbers and names, one class."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from kdtool.data.examples import Examples
from kdtool.data.table import FEATURES, FeatureRows
from kdtool.modeling.tabular_processor import TabularProcessor
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.sections import RunConfig
from kdtool.tasks._base import LABELS, Batch
from kdtool.tasks._classification import ClassificationTask


class Task(ClassificationTask):
    """Rows of a table through kdtool's own architecture, `kdtool-tabular`."""

    name: ClassVar[str] = "tabular-classification"
    auto_class: ClassVar[str] = "AutoModel"
    processor_class: ClassVar[str] = "AutoFeatureExtractor"
    columns: ClassVar[tuple[str, ...]] = (FEATURES, "label")
    default_lr: ClassVar[float] = 1e-3

    def fit_processor(self, rows: Examples | None, config: RunConfig, run: Run) -> Any:
        """Means, deviations and vocabularies of the training rows; which columns hold what is said aloud."""
        if rows is None:
            return None
        table: FeatureRows = rows.columns[FEATURES]  # type: ignore[assignment] # the role says so
        names = table.names
        named = {*config.data.numeric, *config.data.categorical, *(config.data.features or ())}
        numeric = [n for n in names if n in config.data.numeric or table.is_numeric(n)]
        numeric = [n for n in numeric if n not in config.data.categorical]
        counters = [n for n in numeric if n not in named and table.counts_rows(n)]
        numeric = [n for n in numeric if n not in counters]
        categorical = [n for n in names if n not in numeric and n not in counters]
        if counters:
            run.reporter.info(f"features: {', '.join(counters)} left out, which number the rows")
        run.reporter.info(f"features: {_listed(numeric)} numeric; {_listed(categorical)} categorical")
        return TabularProcessor.fit({n: table.numbers(n) for n in numeric}, {n: table.texts(n) for n in categorical})

    def model_values(self, processor: Any) -> dict[str, Any]:
        """Numbers of inputs, columns and names."""
        return dict(processor.sizes)

    def encode(self, rows: Examples, loaded: Loaded, config: RunConfig, run: Run, prefix: str = "") -> Examples:
        """Numbers [n] float32 and ids of names [c] int64 of each row."""
        table: FeatureRows = rows.columns[FEATURES]  # type: ignore[assignment] # the role says so
        processor = loaded.processor
        columns: dict[str, Any] = processor.encode(
            {column["name"]: table.numbers(column["name"]) for column in processor.numeric},
            {column["name"]: table.texts(column["name"]) for column in processor.categorical},
        )
        if "label" in rows.columns:
            columns[LABELS] = np.asarray(rows.columns["label"], dtype=np.int64)
        return Examples(columns)

    def stack(self, prefix: str, items: Sequence[Mapping[str, Any]]) -> Batch:
        """Stack rows, which all have the same columns."""
        return {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]}


def _listed(names: Sequence[str]) -> str:
    """How many, and which where they are few."""
    return f"{len(names)} ({', '.join(names)})" if 0 < len(names) <= 6 else str(len(names))
