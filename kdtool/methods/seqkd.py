"""Sequence-level distillation: learn the texts that the teacher writes (SeqKD).

The teacher goes on from each prompt once; the student learns its tokens by cross-entropy. A teacher in
memory writes token ids during the first epoch; one behind an endpoint, or served by vllm, answers all prompts before.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from pydantic import Field

from kdtool import annotation
from kdtool.authors import Style
from kdtool.data.examples import DataSplits, Examples
from kdtool.errors import DataProblem, UsageProblem
from kdtool.generation import Warp
from kdtool.methods import _base, _sequences
from kdtool.tasks._base import Batch
from kdtool.tasks._prompts import apart, asked

_LONGEST = 512
"""Most tokens of an answer of an endpoint, where nothing else is said."""


@dataclass(frozen=True, slots=True)
class Config(_sequences.PromptConfig, _sequences.WritingConfig):
    """Hyper-parameters."""

    teacher_temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of the teacher's samples; 0 takes the most likely token."""
    teacher_top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of the teacher's samples."""
    chat: bool = False
    """Ask an endpoint by its chat completions."""


class Method(_sequences.SequenceMethod):
    """Sequence-level knowledge distillation."""

    paper: ClassVar[str] = "Kim, Rush: Sequence-Level Knowledge Distillation, 2016, arXiv:1606.07947"
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm", "seq2seq-lm"})
    needs: ClassVar[str] = "texts to go on with"
    teacher_writes: ClassVar[bool] = True
    minimum: ClassVar[str] = "a sampled text is not the distribution it was sampled from"

    told = False
    """Whether the rows to train on hold the teacher's texts."""

    def prepare(self, data: DataSplits, work: _base.Work) -> DataSplits:
        """Have a teacher behind an endpoint, or a local one that vllm serves, answer the prompts.

        Raises:
            UsageProblem: the teacher is a file, which is data; or a setting is for the other kind.
            DataProblem: no prompts.
        """
        teacher, rows, cfg = work.config.teacher, data.train, self.config
        local = not teacher.writes_only
        if local and cfg.chat:
            raise UsageProblem(
                "method.chat is for an endpoint", hint="--set data.chat_template=true for a local teacher"
            )
        if local and teacher.generate_with == "transformers":
            return data
        if teacher.is_file:
            raise UsageProblem("seqkd asks its teacher, and this is a file", hint="--data FILE --method none learns it")
        if rows is None or "prompt" not in rows.columns:
            raise DataProblem("a server answers prompts, and the data has none", hint="--set data.prompt=COLUMN")
        prompts = asked(rows, work.config.data.separator)
        stop = tuple(cfg.stop_strings or ())
        longest = cfg.max_new_tokens or _LONGEST
        style = Style(work.run.seed, cfg.teacher_temperature, cfg.teacher_top_p, longest, stop, cfg.chat)
        # a local teacher sees prompts as they are in training, with what comes behind them
        plain = cfg.chat or local
        given = prompts if plain else [apart(prompt, work.config.data.separator) for prompt in prompts]
        author = (lambda: work.writer(self.teacher_list[0])) if local else work.author
        made = annotation.respond(work.folder, author, given, style)
        self.told = True
        work.facts["respond"] = {"rows": len(made), "empty": sum(not row["response"] for row in made)}
        train = Examples({"prompt": prompts, "response": [row["response"] for row in made]})
        return replace(data, train=train)

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """Cross-entropy with what the teacher wrote."""
        if self.told:
            return self.learn(self.given(batch), weight=0.0, ce_weight=1.0)
        warp = Warp(self.config.teacher_temperature, self.config.teacher_top_p)
        return self.learn(self.taught(batch, progress, warp), weight=0.0, ce_weight=1.0)
