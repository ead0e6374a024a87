"""Causal language modelling: predict each token from those before it.

Texts are joined, each with a beginning-of-sequence token in front (where the tokenizer has one),
and cut into windows of equal length, so nothing is padded. A unit is one predicted token: a window
of n tokens has n - 1 units.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from kdtool.config import RunConfig
from kdtool.data.examples import Examples
from kdtool.divergences import head_of
from kdtool.errors import DataProblem
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.tasks import _base
from kdtool.tasks._base import Batch, Evaluation, Outputs, States, to_device
from kdtool.tasks._heads import body_of, has_plain_head
from kdtool.tasks._text import longest

_WINDOW = 256
_LARGEST = 700.0  # nats whose exponential is still a float


class Task(_base.Task):
    """Plain text through AutoModelForCausalLM."""

    name: ClassVar[str] = "causal-lm"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    processor_class: ClassVar[str] = "AutoTokenizer"
    columns: ClassVar[tuple[str, ...]] = ("text",)
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token-accuracy")
    default_lr: ClassVar[float] = 5e-4
    classifies: ClassVar[bool] = False

    def encode(self, rows: Examples, loaded: Loaded, config: RunConfig, run: Run, prefix: str = "") -> Examples:
        """Windows [rows, window] of token ids.

        Raises:
            DataProblem: not even one window, or teacher and student cut text differently.
        """
        if prefix:
            raise DataProblem(
                "teacher and student have different tokenizers", hint="choose a student with the teacher's tokenizer"
            )
        tokenizer = loaded.processor
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
        """Stack windows."""
        return {"input_ids": torch.from_numpy(np.stack([item["input_ids"] for item in items]))}

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """Logits [tokens, vocabulary] and next tokens [tokens], shifted against each other."""
        ids = batch["input_ids"]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return Outputs(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))

    def has_states(self, model: nn.Module) -> bool:
        """Whether the logits are those of the output embedding, tried on a few tokens."""
        return has_plain_head(model)

    def states(self, model: nn.Module, batch: Batch) -> States:
        """Last hidden states of the tokens but the last, and next tokens."""
        ids = batch["input_ids"]
        hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        return States(hidden.reshape(-1, hidden.shape[-1]), head_of(model), ids[:, 1:].reshape(-1))

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        data: Examples,
        run: Run,
        metrics: Sequence[str],
        batch_size: int,
        teacher: int | None = None,
    ) -> Evaluation:
        """Mean loss in nats per predicted token, perplexity, share of tokens predicted right.

        Standard errors treat windows as independent.
        """
        model.eval()
        losses, hits = [], []
        for start in range(0, len(data), batch_size):
            rows = range(start, min(start + batch_size, len(data)))
            out = self.forward(model, to_device(self.collate([data[i] for i in rows]), run.device))
            assert out.labels is not None
            loss = functional.cross_entropy(out.logits.float(), out.labels, reduction="none")
            losses.append(loss.double().reshape(len(rows), -1).mean(1).cpu().numpy())
            hit = (out.logits.argmax(-1) == out.labels).double()
            hits.append(hit.reshape(len(rows), -1).mean(1).cpu().numpy())
        # windows are equally long, so the mean of window means is the mean over tokens
        loss_mean, loss_error = _mean_and_error(np.concatenate(losses))
        hit_mean, hit_error = _mean_and_error(np.concatenate(hits))
        perplexity = math.exp(loss_mean) if loss_mean < _LARGEST else math.inf
        values = {"loss": loss_mean, "perplexity": perplexity, "token-accuracy": hit_mean}
        errors = {"loss": loss_error, "perplexity": perplexity * loss_error, "token-accuracy": hit_error}
        chosen = [name for name in metrics if name in values]
        return Evaluation(
            {name: values[name] for name in chosen}, {name: errors[name] for name in chosen}, None, None, len(data)
        )

    def example_inputs(self, data: Examples, batch_size: int, teacher: int | None = None) -> Batch:
        """A batch of real windows."""
        return self.collate([data[i % len(data)] for i in range(batch_size)])


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)
