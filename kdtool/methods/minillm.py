"""Reverse KL over whole texts by policy gradient, on texts that student and teacher write together (MiniLLM).

Texts are sampled from alpha p + (1 - alpha) q, token by token. With r_t = log p(y_t) - log q(y_t), R the
length-normalised return of what follows and w_t = q(y_t) / (alpha p(y_t) + (1 - alpha) q(y_t)):

    L = mean over tokens of - min(w_t R_(t+1), clip(w_t, 1 - c, 1 + c) R_(t+1)) + KL(q_t||p_t)
        + ce_weight * cross-entropy on real text

The paper has two factors before R: the weight of the mixture and PPO's ratio to the student that wrote. Here every
text is used once, so that ratio is 1, and the clip bounds their product.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kdtool.data.examples import Examples
from kdtool.data.sources import load_data
from kdtool.divergences import head_of
from kdtool.generation import Mixture, uniforms
from kdtool.methods import _base, _sequences
from kdtool.methods._policy import log_probs, pieces
from kdtool.methods._texts import Text
from kdtool.models import Loaded
from kdtool.run import Run
from kdtool.sections import RunConfig
from kdtool.tasks._base import LABELS, ROWS, Batch, Task, to_device


@dataclass(frozen=True, slots=True)
class Config(_sequences.PromptConfig, _sequences.WritingConfig):
    """Hyper-parameters."""

    teacher_mix: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Alpha, the teacher's share of the distribution that texts are sampled from."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount of rewards by their distance; 0 leaves only the next token's."""
    length_normalization: bool = True
    """Divide returns by the (discounted) number of tokens they sum."""
    clip: Annotated[float, Field(gt=0)] = 0.2
    """Bound on how far the importance weight may be from 1."""
    single_step: Annotated[float, Field(ge=0)] = 1.0
    """Weight of KL(q||p) at each token, the exact part of the gradient."""
    ce_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross-entropy on real text."""
    pretraining_text: str = ""
    """Plain text for that term: a file, folder or id as for data.source; empty takes the training texts."""


class Method(_sequences.SequenceMethod):
    """MiniLLM."""

    paper: ClassVar[str] = "Gu et al.: MiniLLM: Knowledge Distillation of Large Language Models, 2023, arXiv:2306.08543"
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm", "seq2seq-lm"})
    needs: ClassVar[str] = "texts to go on with"

    def __init__(self, config: Any, student: Loaded, teachers: Sequence[Loaded], task: Task) -> None:
        super().__init__(config, student, teachers, task)
        self.windows: Examples | None = None

    def setup(self, batch: Batch, data: Examples) -> None:
        """Read the pretraining text, if any, in windows as long as the first batch; prompts and responses whole."""
        super().setup(batch, data)
        cfg = self.config
        if cfg.ce_weight and cfg.pretraining_text and self.windows is None:
            config = RunConfig()
            config.data.source, config.data.task = cfg.pretraining_text, self.task.name
            config.data.max_length = None if self.opening else int(batch["input_ids"].shape[1])
            rows = load_data(config.data, self.task.columns, (), Run()).train
            assert rows is not None
            # a copy, since a task remembers the settings of what it has read, and scores by them later
            self.windows = copy.copy(self.task).encode(rows, self.student_loaded, config, Run())

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Write together, then learn from it."""
        cfg = self.config
        source = self.source(batch)
        student = self.scorer(self.student, source)
        if cfg.teacher_mix:
            student = Mixture(student, self.scorer(self.teacher_list[0].model, source), cfg.teacher_mix)
        text = self.write(batch, progress, self.sampling(scored=True), student, source=source)
        assert text.log_prob is not None
        mask = text.counts[:, 1:]
        teacher: Any = self.teacher_list[0].model
        with torch.no_grad():
            there = self.hidden(teacher, text)
        found = pieces(
            (self.hidden(self.student, text), head_of(self.student).cut(self.vocabulary)),
            (there, head_of(teacher).cut(self.vocabulary)),
            text.ids[:, 1:],
            mask,
            text.log_prob[:, 1:][mask] if cfg.teacher_mix else None,
            cfg.gamma,
            cfg.length_normalization,
            cfg.clip,
        )
        total = found.policy + cfg.single_step * found.single_step
        parts = {"policy": found.policy.detach(), "kd": found.single_step.detach()}
        parts["teacher log-likelihood"] = found.reward.sum() + found.log_q.sum()
        units = {"teacher log-likelihood": mask.sum().float()}
        if cfg.ce_weight:
            ce = self._cross_entropy(batch, progress, mask.sum(1))
            total, parts["ce"] = total + cfg.ce_weight * ce, ce.detach()
        return _base.Losses(total.float(), mask.sum(), parts, units)

    def _cross_entropy(self, batch: Batch, progress: float, units: Tensor) -> Tensor:
        """Mean over the tokens of each row's real text, times the row's units, so that rows add up to a batch."""
        text = self.given(batch) if self.windows is None else self._drawn(self.windows, batch, progress)
        chosen = text.counts[:, 1:]
        found = self.hidden(self.student, text)[chosen]
        each = log_probs(found, head_of(self.student).cut(self.vocabulary), text.ids[:, 1:][chosen])
        weight = units / chosen.sum(1).clamp_min(1)
        return -(each * weight.repeat_interleave(chosen.sum(1))).sum()

    def _drawn(self, windows: Examples, batch: Batch, progress: float) -> Text:
        """A window of the pretraining text for each row."""
        numbers = uniforms([[*self.key(progress), int(row), -2] for row in batch[ROWS]], 1)[:, 0, 0]
        chosen = self.task.collate([windows[int(u * len(windows))] for u in numbers])
        chosen = to_device(chosen, batch["input_ids"].device)
        if LABELS in chosen:
            return self.given(chosen)
        return Text(chosen["input_ids"], torch.ones_like(chosen["input_ids"], dtype=torch.bool))
