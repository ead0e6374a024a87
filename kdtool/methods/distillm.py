"""Skewed divergences, and student texts used the more the worse the student gets without them (DistiLLM).

Loss per token: KL(q || (1 - a) p + a q), or KL(p || a p + (1 - a) q), a = skew. A step uses texts of the student with
probability phi, else those of the data. phi starts at student_share and rises by rise whenever the loss on held-out
rows has risen by more than tolerance since it was last taken. Texts of the student come from a replay buffer; with
probability phi (1 - share of training done), and until the buffer is full, new ones are written to it first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdtool.data.examples import Examples
from kdtool.divergences import Divergence, compare, head_of
from kdtool.generation import Source, uniforms
from kdtool.methods import _base, _sequences
from kdtool.methods._texts import Text
from kdtool.models import Loaded
from kdtool.tasks._base import ROWS, Batch, Task, to_device
from kdtool.train.parallel import gather_units, places

_AT_ONCE = 16
"""Held-out rows in a forward pass."""


@dataclass(frozen=True, slots=True)
class Config(_sequences.SamplingConfig, _sequences.PromptConfig, _sequences.WritingConfig):
    """Hyper-parameters."""

    divergence: Literal["skewed-kl", "skewed-reverse-kl"] = "skewed-reverse-kl"
    """Skewed-kl or skewed-reverse-kl."""
    skew: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """A, the share of the first distribution in what it is compared with."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides both logits in the loss, without a factor T^2."""
    student_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Phi at the start: share of the steps on the student's texts."""
    rise: Annotated[float, Field(ge=0, le=1)] = 0.1
    """What is added to phi when the held-out loss has risen."""
    tolerance: Annotated[float, Field(ge=0)] = 0.1
    """Rise of the held-out loss, in nats a token, that is taken as one."""
    checks: Annotated[int, Field(gt=0)] = 20
    """How often in all of training the held-out loss is taken."""
    watch_rows: Annotated[int, Field(gt=0)] = 64
    """The most rows that it is taken on."""
    capacity: Annotated[int, Field(gt=0)] = 1000
    """Texts in the replay buffer."""
    replay: Literal["decreasing", "constant", "increasing"] = "decreasing"
    """How the share of newly written texts among the student's changes over training; constant is one half."""


class Method(_sequences.SequenceMethod):
    """DistiLLM."""

    paper: ClassVar[str] = (
        "Ko et al.: DistiLLM: Towards Streamlined Distillation for Large Language Models, 2024, arXiv:2402.03898"
    )
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm", "seq2seq-lm"})
    needs: ClassVar[str] = "texts to go on with"
    golden: ClassVar[str] = "no reference values of its divergences were published; they are checked against autograd"

    phi: Tensor
    last_loss: Tensor
    checked: Tensor
    written: Tensor
    replay_ids: Tensor
    replay_spans: Tensor
    replay_sources: Tensor

    def __init__(self, config: Any, student: Loaded, teachers: Sequence[Loaded], task: Task) -> None:
        super().__init__(config, student, teachers, task)
        # buffers, so that checkpoints hold them
        self.register_buffer("phi", torch.tensor(float(config.student_share), dtype=torch.float64))
        self.register_buffer("last_loss", torch.tensor(torch.inf, dtype=torch.float64))
        self.register_buffer("checked", torch.tensor(0))
        self.register_buffer("written", torch.tensor(0))
        self.watched: Examples | None = None

    def setup(self, batch: Batch, data: Examples) -> None:
        """Make room for texts, and choose the rows to watch."""
        super().setup(batch, data)
        cfg = self.config
        longest = int(batch["input_ids"].shape[1] if data.lengths is None else data.lengths.max())
        width = min(self.positions, longest + (cfg.max_new_tokens or 0))
        self.register_buffer("replay_ids", torch.zeros(cfg.capacity, width, dtype=torch.int32))
        self.register_buffer("replay_spans", torch.zeros(cfg.capacity, 2, dtype=torch.int32))  # prompt, end
        if self.opening:  # what the encoder read to each text, behind its length
            self.register_buffer("replay_sources", torch.zeros(cfg.capacity, 1 + longest, dtype=torch.int32))
        rows = data if self.held_out is None else self.held_out
        self.watched = rows.select(range(min(cfg.watch_rows, len(rows))))

    def cautions(self, epochs: float) -> Sequence[str]:
        """Say so where the rows to watch are rows that are learnt from."""
        if self.held_out is None:
            return ["distillm watches training rows: the data has no validation split apart from the test rows"]
        return ()

    def which(self) -> Divergence:
        """A skewed one."""
        cfg = self.config
        return Divergence(cfg.divergence, skew=cfg.skew, temperature=cfg.temperature)

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Texts of the student or of the data, as the held-out loss asks for."""
        if self.training and int(progress * self.config.checks) >= int(self.checked):
            self._check()
        text = self._text(batch, progress)
        losses = self.learn(text)
        share = losses.count if text.written else losses.count * 0
        return _base.Losses(
            losses.total,
            losses.count,
            {**losses.parts, "student texts": torch.as_tensor(share).float()},
            losses.units,
        )

    def _text(self, batch: Batch, progress: float) -> Text:
        coin, phi = self.coin(progress), float(self.phi)
        if coin >= phi:
            return self.given(batch)
        new = phi * {"decreasing": 1 - progress, "constant": 0.5, "increasing": progress}[self.config.replay]
        fresh = None
        if coin < new or int(self.written) < self.config.capacity:
            fresh = self.sampled(batch, progress)
            if self.training:
                self._remember(fresh, batch[ROWS])
        if fresh is not None and not int(self.written):
            return fresh
        return self._recalled(batch, progress)

    def _check(self) -> None:
        """Take the held-out loss; where it has risen, more texts shall be the student's."""
        loss = self._held_out_loss()
        if loss > float(self.last_loss) + self.config.tolerance:
            self.phi.add_(self.config.rise).clamp_(max=1.0)
        self.last_loss.fill_(loss)
        self.checked.add_(1)

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """Mean cross-entropy over the targets of the watched rows."""
        assert self.watched is not None
        head = head_of(self.student).cut(self.vocabulary)
        total, count = 0.0, 0
        self.student.eval()
        for start in range(0, len(self.watched), _AT_ONCE):
            rows = [self.watched[i] for i in range(start, min(start + _AT_ONCE, len(self.watched)))]
            text = self.given(to_device(self.task.collate(rows), self.phi.device))
            chosen = text.counts[:, 1:]
            hidden = self.hidden(self.student, text)[chosen]
            total += float(compare(hidden, head, None, text.ids[:, 1:][chosen], None, 0.0, 1.0)[1])
            count += int(chosen.sum())
        self.student.train()
        return total / max(count, 1)

    def _remember(self, text: Text, rows: Tensor) -> None:
        """Put texts of all processes into the buffer in the order of the whole batch, the oldest out."""
        columns = torch.arange(text.ids.shape[1], device=text.ids.device)
        ends = torch.where(text.counts, columns + 1, 0).max(1).values
        first = text.counts.long().argmax(1)
        ids = torch.nn.functional.pad(text.ids, (0, max(0, self.replay_ids.shape[1] - text.ids.shape[1])))
        numbers, width = rows.to(ids.device), ids.shape[1]
        parts = [numbers[:, None], first[:, None], ends[:, None], ids]
        if text.source is not None:
            room = self.replay_sources.shape[1] - 1 - text.source.ids.shape[1]
            parts += [text.source.mask.sum(1)[:, None], torch.nn.functional.pad(text.source.ids, (0, room))]
        packed, _ = gather_units(torch.cat(parts, 1))
        order, _ = gather_units(places(len(ids), ids.device))
        seen: set[int] = set()
        for row in packed[order.argsort()]:
            if int(row[0]) in seen:
                continue  # of a process without rows of its own
            seen.add(int(row[0]))
            place = int(self.written) % len(self.replay_ids)
            self.replay_spans[place], self.replay_ids[place] = row[1:3], row[3 : 3 + width]
            if text.source is not None:
                self.replay_sources[place] = row[3 + width :]
            self.written.add_(1)

    def _recalled(self, batch: Batch, progress: float) -> Text:
        """A text of the buffer for each row."""
        size = min(int(self.written), len(self.replay_ids))
        numbers = uniforms([[*self.key(progress), int(row), -2] for row in batch[ROWS]], 1)[:, 0, 0]
        chosen = (numbers * size).long().to(self.replay_ids.device)
        first, ends = self.replay_spans[chosen].long().unbind(1)
        ids = self.replay_ids[chosen, : int(ends.max())].long()
        places = torch.arange(ids.shape[1], device=ids.device)
        counts = (places >= first[:, None]) & (places < ends[:, None])
        return Text(ids, counts, written=True, source=self._source_of(chosen))

    def _source_of(self, chosen: Tensor) -> Source | None:
        """What encoders read to texts of the buffer; None where there are no encoders."""
        if not self.opening:
            return None
        rows = self.replay_sources[chosen].long()
        sizes, ids = rows[:, 0], rows[:, 1 : 1 + int(rows[:, 0].max())]
        return Source(ids, (torch.arange(ids.shape[1], device=ids.device) < sizes[:, None]).long())
