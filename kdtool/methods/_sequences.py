"""Methods of language models that compare student and teacher on texts, given or generated.

A window of the data is cut into a prompt and a target; what is generated keeps its token ids. The loss
is made from hidden states, some tokens at a time (see `kdtool.divergences`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.distributed.tensor import DTensor

from kdtool.data.examples import Examples
from kdtool.divergences import Divergence, compare, head_of
from kdtool.errors import TrainingProblem
from kdtool.generation import CachedModel, Generated, Interleaving, generate, uniforms
from kdtool.methods import _base
from kdtool.models import Loaded
from kdtool.tasks._base import ROWS, Batch, Task


@dataclass(frozen=True, slots=True)
class PromptConfig:
    """Settings of every method that needs prompts."""

    prompt_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of each window that is the prompt; the loss counts what comes after it."""


@dataclass(frozen=True, slots=True)
class Text:
    """Texts of a step.

    Attributes:
        ids: [rows, length], padded on the right.
        counts: [rows, length] bool, true for tokens that the loss counts.
        parts: Sums for the log.
    """

    ids: Tensor
    counts: Tensor
    parts: dict[str, Tensor]


class SequenceMethod(_base.Method):
    """Base: prompts, generation with draws that belong to rows and steps, and the loss."""

    needs_rows: ClassVar[bool] = True
    cacheable: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    seed: Tensor

    def __init__(self, config: Any, student: Loaded, teachers: Sequence[Loaded], task: Task) -> None:
        super().__init__(config, student, teachers, task)
        # saved with a checkpoint, so that a resumed run draws what the whole run would have drawn
        self.register_buffer("seed", torch.tensor(torch.initial_seed() % 2**62))
        models: list[Any] = [self.student, *(teacher.model for teacher in self.teacher_list)]
        sizes = [len(head_of(model).weight) for model in models]
        self.vocabulary = min([len(student.processor), *sizes])
        end = student.processor.eos_token_id
        self.stop = () if end is None else (int(end),)

    def setup(self, batch: Batch, data: Examples) -> None:
        """Check on a first batch that both models' heads give their logits.

        Raises:
            TrainingProblem: one does not, so the loss could not be made from hidden states.
        """
        training = self.student.training
        self.student.eval()
        for model in [self.student, *(teacher.model for teacher in self.teacher_list)]:
            with torch.no_grad():
                hidden = self.hidden(model, batch["input_ids"])
                expected = model(input_ids=batch["input_ids"], use_cache=False).logits
            if not torch.allclose(head_of(model).logits(hidden), expected, rtol=1e-2, atol=1e-2):
                raise TrainingProblem(
                    f"the logits of {type(model).__name__} are not those of its output embedding",
                    hint="use another method, such as kd",
                )
        self.student.train(training)

    @staticmethod
    def hidden(model: Any, ids: Tensor) -> Tensor:
        """Last hidden states [rows, length, width]."""
        found: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return found

    def prompt(self, batch: Batch) -> int:
        """Tokens of the prompt."""
        length = int(batch["input_ids"].shape[1])
        return min(length - 1, max(1, round(float(self.config.prompt_share) * length)))

    def given(self, batch: Batch) -> Text:
        """The texts of the data."""
        ids = batch["input_ids"]
        counts = torch.zeros_like(ids, dtype=torch.bool)
        counts[:, self.prompt(batch) :] = True
        return Text(ids, counts, {})

    def key(self, progress: float) -> list[int]:
        """Numbers that all draws of a step depend on."""
        return [int(self.seed), round(progress * 2**40)]

    def coin(self, progress: float) -> float:
        """A number in [0, 1), one for each step."""
        return float(uniforms([[*self.key(progress), -1]], 1)[0, 0, 0])

    @torch.no_grad()
    def write(self, batch: Batch, settings: Interleaving, key: Sequence[int], who: str = "student") -> Text:
        """Texts that go on from the prompts as far as the windows reach.

        Args:
            batch: Windows and their row numbers.
            settings: Sampling.
            key: Numbers that the draws depend on, besides the row.
            who: `student`, `teacher`, or `both` for the student repaired by its teacher.
        """
        ids, length = batch["input_ids"], self.prompt(batch)
        start = ids[:, :length]
        uniform = uniforms([[*key, int(row)] for row in batch[ROWS]], ids.shape[1] - length)
        models = [] if who == "teacher" else [self.student]
        models += [] if who == "student" else [self.teacher_list[0].model]
        scorers = [CachedModel(model, self.vocabulary) for model in models]
        training = self.student.training
        self.student.eval()
        out: Generated = generate(scorers[0], (*scorers, None)[1], start, torch.ones_like(start), uniform, settings)
        self.student.train(training)
        parts = {}
        if who == "both":
            parts["acceptance"] = (out.kept & out.valid).sum().float()
            parts["teacher log-likelihood"] = out.teacher_log_prob.sum().float()
        counts = torch.cat([torch.zeros_like(start, dtype=torch.bool), out.valid], 1)
        return Text(torch.cat([start, out.tokens], 1), counts, parts)

    def learn(self, text: Text, which: Divergence, weight: float, ce_weight: float) -> _base.Losses:
        """Divergence and cross-entropy on the tokens of a text that count."""
        chosen = text.counts[:, 1:]
        head = head_of(self.student)
        if isinstance(head.weight, DTensor):
            raise TrainingProblem(
                "this method needs the whole output embedding in each process", hint="--set train.parallel=ddp"
            )
        hidden = self.hidden(self.student, text.ids)[:, :-1][chosen]
        labels = text.ids[:, 1:][chosen]
        teacher = None
        if weight:
            model: Any = self.teacher_list[0].model
            with torch.no_grad():
                there = self.hidden(model, text.ids)[:, :-1][chosen]
            teacher = (there, head_of(model).cut(self.vocabulary))
        own = head.cut(self.vocabulary)
        total, ce, apart = compare(hidden, own, teacher, labels, which, weight, ce_weight)
        parts = dict(text.parts)
        if ce_weight:
            parts["ce"] = ce.detach()
        if weight:
            parts["kd"] = apart.detach()
        return _base.Losses(total, chosen.sum(), parts)
