"""Methods of language models that compare student and teacher on texts, given or generated.

A row is a prompt and what follows it: its response where the data has responses, else the second part of a
window of plain text. With encoder-decoders the prompt is the source that the encoder reads, and a row is what the
decoder sees: the token that texts begin with, and the response. What is generated keeps its token ids. The loss
is made from hidden states, some tokens at a time (see `kdtool.divergences`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.distributed.tensor import DTensor

from kdtool.data.examples import Examples
from kdtool.divergences import Divergence, Head, Teacher, TopK, compare, head_of
from kdtool.errors import TrainingProblem
from kdtool.generation import (
    CachedModel,
    EncoderDecoder,
    Generated,
    Interleaving,
    Scorer,
    Source,
    StopStrings,
    Warp,
    generate,
    in_step,
    uniforms,
)
from kdtool.methods import _base
from kdtool.methods._kept import Kept
from kdtool.methods._once import Once
from kdtool.methods._texts import Text, joined
from kdtool.models import Loaded
from kdtool.tasks._base import LABELS, ROWS, VIEW, Batch, Task
from kdtool.tasks._heads import body_of, decoded
from kdtool.tasks._language import IGNORED
from kdtool.tasks._packing import POSITIONS
from kdtool.tasks._writing import decoder_start, ends_of, opening

_ONE_AT_A_TIME = frozenset({"prophetnet"})
"""Kinds of decoders that read a single token behind what they have in their cache."""


@dataclass(frozen=True)
class PromptConfig:
    """Settings of every method that cuts texts into prompt and target."""

    prompt_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of each window of plain text that is the prompt; rows with responses have prompts of their own."""


@dataclass(frozen=True)
class LossConfig:
    """Settings of the divergence."""

    divergence: Literal["forward-kl", "reverse-kl", "jsd", "tvd", "skewed-kl", "skewed-reverse-kl"] = "forward-kl"
    """Forward-kl, reverse-kl, jsd, tvd, skewed-kl or skewed-reverse-kl."""
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Of jsd: 0 is forward KL, 1 reverse KL."""
    skew: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of the skewed kinds: share of the first distribution in what it is compared with."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides both logits in the loss, without a factor T^2."""


@dataclass(frozen=True)
class WritingConfig:
    """Settings of every method that generates."""

    max_new_tokens: Annotated[int, Field(gt=0)] | None = None
    """The most that is generated for a prompt (default: as many tokens as follow it in the data)."""
    stop_strings: list[str] | None = None
    """Texts end where they hold one of these, besides the end-of-text token."""
    save_generations: bool = False
    """Write what was generated to generations.jsonl in the output folder."""


@dataclass(frozen=True)
class SamplingConfig:
    """How the student samples alone."""

    student_temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of the student's samples; 0 takes the most likely token."""
    student_top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of the student's samples."""


@dataclass(frozen=True)
class RepairConfig:
    """How the teacher repairs what the student proposes."""

    k: Annotated[int, Field(gt=0)] = 25
    """Rank up to which the teacher lets a token pass; the size of the vocabulary makes it on-policy."""
    gamma: Annotated[int, Field(gt=0)] = 5
    """The most tokens drafted before the teacher looks; changes the speed, not the texts."""
    expected_seq_len: Annotated[int, Field(ge=0)] = 0
    """Tokens over which k falls to 1 within a text, a step after each so many blocks of gamma; 0 leaves it."""
    student_temperature: Annotated[float, Field(ge=0)] = 0.5
    """Of proposals; 0 takes the most likely token."""
    student_top_p: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Nucleus of proposals."""
    teacher_temperature: Annotated[float, Field(ge=0)] = 0.2
    """Of replacements."""
    teacher_top_p: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Nucleus of replacements."""


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
        models = self.models
        sizes = [len(head_of(model).weight) for model in models]
        self.vocabulary = min([len(student.processor), *sizes])
        # a window longer than the model's positions cannot be, so what follows a prompt in the data always fits
        self.positions = min(int(getattr(model.config, "max_position_embeddings", None) or 2**31) for model in models)
        self.stop = tuple(ends_of(self.student, student.processor))
        self.opening = opening(models[0]) if models[0].config.is_encoder_decoder else []
        strings = getattr(config, "stop_strings", None)
        self.stop_strings = StopStrings(student.processor, strings) if strings else None
        self.kept, self.once = Kept(student.processor), Once(student.processor)

    @property
    def models(self) -> list[Any]:
        """The student and its teachers."""
        return [self.student, *(teacher.model for teacher in self.teacher_list)]

    @classmethod
    def chunk(cls, config: Any) -> int | None:
        """As many tokens as the device likes."""
        return 0

    def setup(self, batch: Batch, data: Examples) -> None:
        """Check that both models' heads give their logits, and that their decoders begin alike.

        Raises:
            TrainingProblem: one does not, so the loss could not be made from hidden states; or its rows are written in
                step, and a setting counts the blocks of each.
        """
        if isinstance(head_of(self.student).weight, DTensor):
            raise TrainingProblem(
                "this method needs the whole output embedding in each process", hint="--set train.parallel=ddp"
            )
        for model in self.models:
            if not self.task.has_states(model):
                raise TrainingProblem(
                    f"the logits of {type(model).__name__} are not those of its output embedding",
                    hint="use another method, such as kd",
                )
        if self.opening and any(decoder_start(model) != self.opening[0] for model in self.models):
            raise TrainingProblem(
                "the decoders of teacher and student begin with different tokens",
                hint="give both the same decoder_start_token_id in their config.json",
            )
        if isinstance(self.config, RepairConfig) and any(
            model.config.model_type in _ONE_AT_A_TIME for model in self.models
        ):
            raise TrainingProblem(
                "the decoder of a ProphetNet reads one token at a time behind its cache, and repairing reads several",
                hint="use another method, such as gkd",
            )
        if getattr(self.config, "expected_seq_len", 0) and self.in_step:
            raise TrainingProblem(
                f"method.expected_seq_len counts blocks of a text, and {type(self.student).__name__} writes in others",
                hint="leave it out, or use T5 and its kin, whose decoders have relative positions",
            )

    @property
    def in_step(self) -> bool:
        """Whether one of the models needs rows that go on together."""
        return any(map(in_step, self.models))

    @staticmethod
    def hidden(model: Any, text: Text) -> Tensor:
        """Last hidden states [rows, length - 1, width] that predict the tokens from the second on.

        Rows are padded on the right, where no token that counts can see, so there is no mask; positions that
        start anew keep texts of one row apart.
        """
        if text.source is not None:
            return decoded(model, text.ids[:, :-1], None, text.source.states(model), text.source.mask)
        inputs = {} if text.positions is None else {POSITIONS: text.positions}
        found: Tensor = body_of(model)(input_ids=text.ids, use_cache=False, **inputs).last_hidden_state
        return found[:, :-1]

    def source(self, batch: Batch) -> Source | None:
        """What encoders read, where there are such."""
        return Source(batch["input_ids"], batch["attention_mask"]) if self.opening else None

    def prompts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens of each row's prompt, at least one, and of what follows it, [rows] both."""
        batch = self.task.lines(batch)
        ids = batch["input_ids"]
        if LABELS not in batch:
            rows, length = ids.shape
            first = min(length - 1, max(1, round(float(self.config.prompt_share) * length)))
            found = torch.full((rows,), first, device=ids.device)
            return found, length - found
        counted = (batch[LABELS] != IGNORED).long()
        first_counted = counted.argmax(1).clamp_min(max(1, len(self.opening)))
        return first_counted, batch["attention_mask"].sum(1) - first_counted

    def given(self, batch: Batch) -> Text:
        """The texts of the data."""
        source, batch = self.source(batch), self.task.lines(batch)
        ids = batch["input_ids"]
        if LABELS in batch:
            return Text(ids, batch[LABELS] != IGNORED, batch.get(POSITIONS), source=source)
        first, _ = self.prompts(batch)
        return Text(ids, torch.arange(ids.shape[1], device=ids.device) >= first[:, None])

    def begun(self, batch: Batch) -> Tensor:
        """Rows [rows, length] whose first tokens are what is to be gone on from."""
        ids = self.task.lines(batch)["input_ids"]
        if not self.opening:
            return ids
        start = torch.tensor(self.opening, device=ids.device).expand(len(ids), -1)
        return torch.cat([start, ids[:, len(self.opening) :]], 1)

    def key(self, progress: float) -> list[int]:
        """Numbers that all draws of a step depend on."""
        return [int(self.seed), round(progress * 2**40)]

    def coin(self, progress: float) -> float:
        """A number in [0, 1), one for each step."""
        return float(uniforms([[*self.key(progress), -1]], 1)[0, 0, 0])

    def sampling(self, **values: Any) -> Interleaving:
        """Settings of sampling, with what ends a text."""
        return Interleaving(stop=self.stop, stop_strings=self.stop_strings, in_step=self.in_step, **values)

    def scorer(self, model: Any, source: Source | None = None) -> Scorer:
        """A model that reads and writes; from a source where it has an encoder."""
        return CachedModel(model, self.vocabulary) if source is None else EncoderDecoder(model, source, self.vocabulary)

    def sampled(self, batch: Batch, progress: float) -> Text:
        """Texts of the student alone."""
        cfg = self.config
        settings = self.sampling(student=Warp(cfg.student_temperature, cfg.student_top_p))
        source = self.source(batch)
        return self.write(batch, progress, settings, self.scorer(self.student, source), source=source)

    def repaired(self, batch: Batch, progress: float) -> Text:
        """Texts of the student, repaired by its teacher."""
        cfg = self.config
        settings = self.sampling(
            k=cfg.k,
            gamma=cfg.gamma,
            expected_length=cfg.expected_seq_len,
            student=Warp(cfg.student_temperature, cfg.student_top_p),
            teacher=Warp(cfg.teacher_temperature, cfg.teacher_top_p),
            scored=True,
        )
        source = self.source(batch)
        student, teacher = (self.scorer(model, source) for model in self.models)
        return self.write(batch, progress, settings, student, teacher, source=source)

    def taught(self, batch: Batch, progress: float, warp: Warp) -> Text:
        """Texts of the teacher alone; a row has the same whenever it is seen, and in training it is written once."""
        model: Any = self.teacher_list[0].model
        settings, key, source = self.sampling(student=warp), [int(self.seed)], self.source(batch)
        if not self.training:
            return self.write(batch, progress, settings, self.scorer(model, source), key=key, source=source)
        if self.folder is not None:
            self.once.open(self.folder / "data")
        rows = batch[ROWS].tolist()
        new = self.once.missing(rows)
        if new:
            part = {name: value[new] for name, value in batch.items()}
            writer = self.scorer(model, self.source(part))
            self.once.add([rows[i] for i in new], self.drawn(part, settings, writer, None, key))
        out = self.once.of(rows, settings.pad, batch["input_ids"].device)
        return self.text(batch, progress, settings, out, source=source)

    @torch.no_grad()
    def write(
        self,
        batch: Batch,
        progress: float,
        settings: Interleaving,
        writer: Scorer,
        teacher: Scorer | None = None,
        key: Sequence[int] | None = None,
        source: Source | None = None,
    ) -> Text:
        """Texts that go on from the prompts.

        Args:
            batch: Rows and their numbers.
            progress: Share of training done.
            settings: Sampling.
            writer: Writes.
            teacher: Repairs.
            key: Numbers that the draws depend on, besides the row (default: those of the step).
            source: What encoders read, as the writers have it.
        """
        out = self.drawn(batch, settings, writer, teacher, self.key(progress) if key is None else key)
        return self.text(batch, progress, settings, out, teacher, source)

    @torch.no_grad()
    def drawn(
        self, batch: Batch, settings: Interleaving, writer: Scorer, teacher: Scorer | None, key: Sequence[int]
    ) -> Generated:
        """What goes on from the prompts; see `write`."""
        first, room = self.prompts(batch)
        most = self.config.max_new_tokens
        limits = room if most is None else (self.positions - first).clamp_max(most)
        places = torch.arange(int(first.max()), device=first.device) - (int(first.max()) - first)[:, None]
        start = self.begun(batch).gather(1, places.clamp_min(0))
        numbers = [[*key, int(row)] for row in batch[ROWS]]
        training = self.student.training
        self.student.eval()
        out = generate(
            writer, teacher, start, (places >= 0).long(), uniforms(numbers, max(1, int(limits.max()))), settings, limits
        )
        self.student.train(training)
        return out

    def text(
        self,
        batch: Batch,
        progress: float,
        settings: Interleaving,
        out: Generated,
        teacher: Scorer | None = None,
        source: Source | None = None,
    ) -> Text:
        """Prompts and what goes on from them, with what is logged of it; see `write`."""
        first, _ = self.prompts(batch)
        text = joined(self.begun(batch), first, out, settings, source)
        if teacher is not None:
            size = out.valid.sum().float()
            text.parts["acceptance"], text.units["acceptance"] = (out.kept & out.valid).sum().float(), size
            text.parts["teacher log-likelihood"] = out.log_prob.sum().float()
            text.units["teacher log-likelihood"] = size
        if self.config.save_generations and self.training and self.folder is not None:
            prompts = (text.ids, first) if source is None else (source.ids, source.mask.sum(1))
            self.kept.add(self.folder, round(progress * self.steps) + 1, batch[ROWS], *prompts, out, teacher)
        return text

    def which(self) -> Divergence:
        """The divergence of the configuration."""
        cfg = self.config
        return Divergence(cfg.divergence, cfg.beta, cfg.skew, cfg.temperature)

    def stored(self, batch: Batch, text: Text) -> TopK | None:
        """What a cache of likely tokens says of the places that count in a text of the data; None without one."""
        if 0 not in self.caches or VIEW not in batch:
            return None
        told = self.caches[0].get(batch[VIEW])
        assert isinstance(told, TopK)
        counts, batch = text.counts[:, 1:], self.task.lines(batch)
        return told[counts[batch[LABELS][:, 1:] != IGNORED] if LABELS in batch else counts.flatten()]

    def learn(self, text: Text, weight: float = 1.0, ce_weight: float = 0.0, told: TopK | None = None) -> _base.Losses:
        """Divergence and cross-entropy on the tokens of a text that count.

        Args:
            text: The texts.
            weight: Of the divergence.
            ce_weight: Of the cross-entropy with the text.
            told: What is known of the teacher, which is then not asked.
        """
        chosen = text.counts[:, 1:]
        hidden = self.hidden(self.student, text)[chosen]
        labels = text.ids[:, 1:][chosen]
        parts, units = dict(text.parts), dict(text.units)
        teacher: Teacher | None = told
        if weight and told is None:
            teacher = self.heard(text, chosen)
            if text.written and "teacher log-likelihood" not in parts:
                with torch.no_grad():
                    _, ce, _ = compare(*teacher, None, labels, None, 0.0, 1.0)
                parts["teacher log-likelihood"], units["teacher log-likelihood"] = -ce, chosen.sum().float()
        own = head_of(self.student).cut(self.vocabulary)
        which = self.which() if weight else None
        total, ce, apart = compare(hidden, own, teacher, labels, which, weight, ce_weight)
        if ce_weight:
            parts["ce"] = ce.detach()
        if weight:
            parts["kd"] = apart.detach()
        return _base.Losses(total, chosen.sum(), parts, units)

    @torch.no_grad()
    def heard(self, text: Text, chosen: Tensor) -> tuple[Tensor, Head]:
        """The teacher's hidden states [tokens, width] at the chosen places [rows, length - 1], and its head."""
        model: Any = self.teacher_list[0].model
        return self.hidden(model, text)[chosen], head_of(model).cut(self.vocabulary)
