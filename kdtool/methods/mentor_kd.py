"""Rationales of a large teacher, more of them by a mid-size mentor, and the mentor's probabilities (Mentor-KD).

The teacher (a model, an endpoint, or a file of rationales) explains its answers to the training questions.
What ends in the right answer trains the mentor, who explains each question again, several times. The
student learns the right rationales of both:
L = (1 - lambda) CE + lambda KL(softmax(m/T) || softmax(s/T)), means over the tokens of the rationale.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from kdtool import annotation
from kdtool.annotation import Question
from kdtool.authors import Style
from kdtool.data.examples import DataSplits, Examples
from kdtool.divergences import Divergence, compare_all, cross_entropy, divergence
from kdtool.errors import UsageProblem
from kdtool.journal import Row, as_lines
from kdtool.methods import _base
from kdtool.models import Loaded
from kdtool.tasks._base import Batch, Task
from kdtool.writing import write_bytes


@dataclass(frozen=True, slots=True)
class Config:
    """Hyper-parameters."""

    mentor: str | None = None
    """The model between teacher and student: folder, Hub id or configuration file; not needed for RD from a file."""
    mentor_epochs: Annotated[float, Field(ge=0)] = 20.0
    """Passes of the mentor over the teacher's rationales; 0 takes it as it is."""
    mentor_lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate of the mentor."""
    n_teacher: Annotated[int, Field(gt=0)] = 6
    """Rationales asked of the teacher for each question."""
    n_keep: Annotated[int, Field(ge=0)] = 3
    """Right ones of them to learn from, drawn at random; 0 keeps all."""
    n_aug: Annotated[int, Field(ge=0)] = 3
    """Rationales asked of the mentor for each question; 0 does without (SLD only)."""
    augmented: str | None = None
    """File of rationales to take in place of those that the mentor would write."""
    kd_lambda: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Weight of the divergence from the mentor against the cross-entropy; 0 does without (RD only)."""
    kd_temperature: Annotated[float, Field(gt=0)] = 2.0
    """T of that divergence, without a factor T^2."""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """Of the rationales of teacher and mentor."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 512
    """Longest rationale in tokens of its author."""
    distinct: bool = True
    """Drop rationales that come twice."""
    chat: bool = False
    """Ask the teacher by its chat template, or by the chat completions of its endpoint."""


class Method(_base.Method):
    """Mentor-KD: rationale distillation and soft-label distillation from a mentor."""

    paper: ClassVar[str] = (
        "Lee, Kim, Lee: Mentor-KD: Making Small Language Models Better Multi-step Reasoners, EMNLP 2024, "
        "arXiv:2410.09037"
    )
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm", "seq2seq-lm"})
    needs: ClassVar[str] = "texts to learn"
    teacher_writes: ClassVar[bool] = True
    loads_teacher: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ("exact-answer",)
    minimum: ClassVar[str] = "the cross-entropy with the rationale stays"

    def __init__(self, config: Any, student: Loaded, teachers: Sequence[Loaded], task: Task) -> None:
        super().__init__(config, student, teachers, task)
        writes = config.n_aug > 0 and config.augmented is None
        self.soft, self.by_chunks = config.kd_lambda > 0, False
        if not teachers and config.mentor is None and (self.soft or writes):
            why = "kd_lambda compares with it" if self.soft else "n_aug asks it for rationales"
            raise UsageProblem("mentor-kd has no mentor", why=why, hint="--set method.mentor=MODEL")

    def prepare(self, data: DataSplits, work: _base.Work) -> DataSplits:
        """Stages annotate, filter, fit-mentor and augment.

        Raises:
            DataProblem: no questions with answers, or no right rationale.
        """
        cfg: Config = self.config
        assert data.train is not None, "a run without training rows is refused before"
        rule = work.config.eval.answers
        questions = annotation.questions_of(data.train, rule)
        style = Style(work.run.seed, cfg.temperature, 1.0, cfg.max_new_tokens, (), cfg.chat)
        rows = self._annotations(questions, rule, style, work)
        rows = annotation.chosen(rows, cfg.n_keep, work.run.seed, cfg.distinct)
        work.facts["filter"] = {"kept": len(rows), "questions": len({row["question"] for row in rows})}
        made = self._with_mentor(questions, rule, style, rows, work)
        rows = [{**row, "source": "teacher"} for row in rows] + [{**row, "source": "mentor"} for row in made]
        rows = annotation.chosen(rows, 0, work.run.seed, cfg.distinct)
        work.facts["train"] = {name: sum(row["source"] == name for row in rows) for name in ("teacher", "mentor")}
        if work.run.rank == 0:
            write_bytes(work.folder / "train.jsonl", as_lines(rows))
        train = annotation.as_examples(rows)
        return replace(data, train=train)

    def _annotations(self, questions: list[Question], rule: str, style: Style, work: _base.Work) -> list[Row]:
        """Stage annotate: rationales of the teacher."""
        teacher = work.config.teacher
        if teacher.is_file:
            path = Path(str(teacher.model)).expanduser()
            rows = annotation.from_file(path, work.folder / "annotations.jsonl", questions, rule)
        else:
            rows = annotation.annotate(work.folder, work.author, questions, self.config.n_teacher, style, rule)
        work.facts["annotate"] = _tally(rows, questions, work)
        return rows

    def _with_mentor(
        self, questions: list[Question], rule: str, style: Style, rows: list[Row], work: _base.Work
    ) -> list[Row]:
        """Stages fit-mentor and augment: the mentor becomes the teacher of the loss; gives its right rationales."""
        cfg: Config = self.config
        own = cfg.n_aug > 0 and cfg.augmented is None
        mentor = self._mentor(rows, work) if self.soft or own else None
        if self.soft and mentor is not None:
            self._take(mentor, work)
        if not cfg.n_aug:
            return []
        if own:
            assert mentor is not None, "whoever writes was loaded"
            plain = Style(style.seed, style.temperature, 1.0, style.max_tokens)
            author = work.writer(mentor)
            made = annotation.augment(work.folder, lambda: author, questions, cfg.n_aug, plain, rule)
        else:
            path = Path(str(cfg.augmented)).expanduser()
            made = annotation.from_file(path, work.folder / "augmented.jsonl", questions, rule)
        work.facts["augment"] = _tally(made, questions, work)
        return annotation.chosen(made, cfg.n_aug, style.seed, cfg.distinct)

    def _mentor(self, rows: list[Row], work: _base.Work) -> Loaded:
        """Stage fit-mentor."""
        cfg: Config = self.config
        settings = work.config.train.model_copy(
            update={"epochs": cfg.mentor_epochs, "lr": cfg.mentor_lr, "max_steps": None, "checkpoint_every": None}
        )
        work.facts["fit-mentor"] = {"model": cfg.mentor, "epochs": cfg.mentor_epochs, "rows": len(rows)}
        return work.fit(str(cfg.mentor), annotation.as_examples(rows), settings, "mentor")

    def _take(self, mentor: Loaded, work: _base.Work) -> None:
        """Let the mentor teach, if it has the student's tokens."""
        if mentor.processor.get_vocab() != self.student_loaded.processor.get_vocab():
            work.run.reporter.warn(
                f"mentor '{mentor.ref}' and the student have different tokenizers: its rationales are used, its "
                "probabilities are not (kd_lambda 0)"
            )
            self.soft = False
            work.facts["distill"] = {"kd_lambda": 0.0}
            return
        mentor.model.eval().requires_grad_(False)
        self.teacher_list = [mentor]

    @classmethod
    def chunk(cls, config: Any) -> int | None:
        """As many tokens as the device likes."""
        return 0

    def setup(self, batch: Batch, data: Examples) -> None:
        """See whether the models' logits can be made some tokens at a time."""
        models = [self.student, *(teacher.model for teacher in self.teacher_list)]
        self.by_chunks = all(self.task.has_states(model) for model in models)

    def told_at(self) -> float | None:
        """The temperature, where the mentor is compared some tokens at a time."""
        return float(self.config.kd_temperature) if self.soft and self.by_chunks else None

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Cross-entropy with the rationale, and the divergence from the mentor along it (section 3.3 of the paper)."""
        weight = float(self.config.kd_lambda) if self.soft else 0.0
        which = Divergence(temperature=self.config.kd_temperature)
        if self.by_chunks:
            own = self.task.states(self.student, batch)
            terms = [(which, weight)] if self.soft else []
            teacher = self.tell(batch) if self.soft else None
            total, sums = compare_all(own.hidden, own.head, teacher, own.labels, terms, 1 - weight)
            return _base.Losses(total, len(own.hidden), dict(zip(("ce", "kd"), sums, strict=False)))
        out = self.task.forward(self.student, batch)
        ce = cross_entropy(out.logits, _base.labels_of(out))
        if not self.soft:
            return _base.Losses(ce, len(out.logits), {"ce": ce.detach()})
        theirs = self.teach(batch).logits
        size = min(out.logits.shape[-1], theirs.shape[-1])  # heads may be padded to different round sizes
        kd = divergence(out.logits[:, :size], theirs[:, :size], which)
        parts = {"ce": ce.detach(), "kd": kd.detach()}
        return _base.Losses((1 - weight) * ce + weight * kd, len(out.logits), parts)


def _tally(rows: Sequence[Row], questions: Sequence[Question], work: _base.Work) -> dict[str, Any]:
    """Numbers of a stage, said aloud."""
    right = [row for row in rows if row["initial_correct"]]
    answered = len({row["question"] for row in right})
    work.run.reporter.info(
        f"{len(right)} of {len(rows)} rationales end in the right answer, for {answered} of {len(questions)} questions"
    )
    return {"rows": len(rows), "right": len(right), "questions": len(questions), "answered": answered}
