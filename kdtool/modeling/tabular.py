"""Residual networks on rows of a table.

Gorishniy, Rubachev, Khrulkov, Babenko: Revisiting Deep Learning Models for Tabular Data, 2021,
arXiv:2106.11959, section 3.2, with layer norm in place of batch norm, so that what a row gives does
not depend on the rows beside it, and with embeddings of the columns that hold names.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class TabularConfig(PreTrainedConfig):
    """Configuration of `TabularClassifier`.

    Attributes:
        hidden_size: Width between the blocks.
        num_hidden_layers: Number of blocks.
        intermediate_size: Width inside the blocks.
        embedding_size: Width of the embedding of each column of names.
        dropout: Share of the values inside the blocks set to 0 in training.
        num_numeric: Inputs that are numbers; set from the data.
        num_columns: Columns of names; set from the data.
        num_categories: Names of all columns together; set from the data.
    """

    model_type = "kdtool-tabular"

    hidden_size: int = 128
    num_hidden_layers: int = 3
    intermediate_size: int = 256
    embedding_size: int = 8
    dropout: float = 0.1
    num_numeric: int = 0
    num_columns: int = 0
    num_categories: int = 0


class TabularBlock(nn.Module):
    """x + W2 drop(relu(W1 norm(x)))."""

    def __init__(self, config: TabularConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.linear1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(config.dropout)
        self.linear2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, hidden_size] to the same shape."""
        result: Tensor = x + self.linear2(self.dropout(self.relu(self.linear1(self.norm(x)))))
        return result


class TabularClassifier(PreTrainedModel):
    """Linear layer on numbers and embedded names, residual blocks, norm, ReLU, linear head."""

    config_class = TabularConfig
    base_model_prefix = ""
    main_input_name = "numeric"

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        width = config.num_numeric + config.num_columns * config.embedding_size
        if config.num_columns:
            self.embeddings = nn.Embedding(config.num_categories, config.embedding_size)
        self.input = nn.Linear(width, config.hidden_size)
        self.layers = nn.ModuleList(TabularBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.relu = nn.ReLU()
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of names; the first linear layer where there are none."""
        found: nn.Module = self.embeddings if self.config.num_columns else self.input
        return found

    def forward(
        self,
        numeric: Tensor | None = None,
        categories: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> ImageClassifierOutput:
        """Logits [batch, classes], and the mean cross-entropy with labels.

        Args:
            numeric: [batch, num_numeric] float32; None where there are none.
            categories: [batch, num_columns] ids, those of each column after those of the column before.
            labels: [batch] class ids.
        """
        parts = [] if numeric is None else [numeric]
        if categories is not None:
            parts.append(self.embeddings(categories).flatten(1))
        x = self.input(torch.cat(parts, 1).to(self.input.weight.dtype))
        for layer in self.layers:
            x = layer(x)
        logits = self.classifier(self.relu(self.norm(x)))
        loss = None if labels is None else functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
