"""Student and teacher talk: the teacher's upper layers answer what the student's lower layers say (Talking Models).

States at a low and a high layer of the student (s_l, s_h) and the teacher (t_l, t_h), codecs to and from a
shared message space (e_s, d_s, e_t, d_t), M_t the teacher's frozen layers between its two states, and d the mean
squared difference over features, then over positions that count:

    m_1 = e_s(s_l);  a_n = e_t(M_t(d_t(m_n)));  z_n = d_s(a_n);  m_(n+1) = e_s(z_n)
    L_interact = 1/N sum_n d(z_n, s_h)
    L_MC = d(e_s(s_l), e_t(t_l)) + d(e_s(s_h), e_t(t_h))
    L_SC = d(d_t(e_s(s_l)), t_l) + d(d_s(e_t(t_h)), s_h)
    L = CE + w1 L_interact + w2 L_MC + w3 L_SC

The form is this project's reading: the paper's equations were not available, and no official code exists.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from kdtool.data.examples import Examples
from kdtool.errors import ConfigProblem
from kdtool.features import stages_of, taps
from kdtool.methods import _terms
from kdtool.methods._terms import Side, Term
from kdtool.tasks._base import Batch, view_of

_WIDE = 256
"""States wider than this are normalised, lest one large feature dominate the squared differences."""


@dataclass(frozen=True, slots=True)
class Config(_terms.TermConfig):
    """How long and through what they talk."""

    rounds: Annotated[int, Field(ge=0)] = 2
    """N; 0 leaves only the consistency of messages and states, the ablation to compare with."""
    message_dim: Annotated[int, Field(ge=0)] = 0
    """Width of messages; 0 is the smaller of the two models' widths."""
    codec: Literal["linear", "mlp"] = "mlp"
    """One layer, or two with a ReLU between them."""
    student_layers: list[int] | None = None
    """Numbers of the student's low and high layer (default: at a third, and the last)."""
    teacher_layers: list[int] | None = None
    """Numbers of the teacher's low and high layer (default: at a third, and the last)."""
    interact_weight: Annotated[float, Field(ge=0)] = 1.0
    """w1."""
    message_weight: Annotated[float, Field(ge=0)] = 0.5
    """w2."""
    state_weight: Annotated[float, Field(ge=0)] = 0.5
    """w3."""
    interact_warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of training over which w1 rises: at first decoded states mean nothing to the teacher."""
    state_consistency: Literal["cross", "auto"] = "cross"
    """Decode the other model's messages, or the model's own."""
    stop_high: bool = False
    """Take s_h as a constant target."""
    pool: Literal["auto", "always"] = "auto"
    """Talk by position where both models have the same positions, else by means over positions; or always so."""


class Talk(NamedTuple):
    """What was said, as means.

    Attributes:
        rounds: [N] d(z_n, s_h).
        message: L_MC.
        state: L_SC.
        own: L_SC in which each model decodes its own messages.
        last: z_N; m_1 decoded by the student where N is 0.
    """

    rounds: Tensor
    message: Tensor
    state: Tensor
    own: Tensor
    last: Tensor


def distance(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over features of (a - b)^2, then over positions; [B, L, d] and [B, L] with 1 where a position counts."""
    each = (a - b).square().mean(-1)
    return each.mean() if mask is None else (each * mask).sum() / mask.sum().clamp_min(1)


def converse(
    codecs: Mapping[str, Callable[[Tensor], Tensor]],
    middle: Callable[[Tensor], Tensor],
    states: tuple[Tensor, Tensor, Tensor, Tensor],
    mask: Tensor | None,
    rounds: int,
    stop_high: bool = False,
) -> Talk:
    """All rounds of a conversation.

    Args:
        codecs: enc_s, dec_s, enc_t, dec_t.
        middle: M_t.
        states: s_l, s_h [B, L, d_s], t_l, t_h [B, L, d_t].
        mask: [B, L] 1 for positions that count; None for all.
        rounds: N.
        stop_high: Take s_h as constant in the target of the rounds.
    """
    s_l, s_h, t_l, t_h = states
    enc_s, dec_s, enc_t, dec_t = (codecs[name] for name in ("enc_s", "dec_s", "enc_t", "dec_t"))
    first, goal = enc_s(s_l), s_h.detach() if stop_high else s_h
    message, last, found = first, dec_s(first), []
    for number in range(rounds):
        message = enc_s(last) if number else first
        last = dec_s(enc_t(middle(dec_t(message))))
        found.append(distance(last, goal, mask))
    low_t, high_t, high_s = enc_t(t_l), enc_t(t_h), enc_s(s_h)
    own = distance(dec_s(first), s_l, mask) + distance(dec_s(high_s), s_h, mask)
    own = own + distance(dec_t(low_t), t_l, mask) + distance(dec_t(high_t), t_h, mask)
    return Talk(
        torch.stack(found) if found else s_l.new_zeros(0),
        distance(first, low_t, mask) + distance(high_s, high_t, mask),
        distance(dec_t(first), t_l, mask) + distance(dec_s(high_t), s_h, mask),
        own,
        last,
    )


def linear_cka(a: Tensor, b: Tensor) -> Tensor:
    """Linear centred kernel alignment of two sets of vectors [n, p] and [n, q]: 0 to 1 (Kornblith et al., 2019)."""
    a, b = a - a.mean(0), b - b.mean(0)
    shared: Tensor = (a.T @ b).square().sum()
    size: Tensor = torch.linalg.matrix_norm(a.T @ a) * torch.linalg.matrix_norm(b.T @ b)
    return shared / size.clamp_min(1e-12)


def codec(wide: int, narrow: int, kind: str, hidden: int) -> nn.Sequential:
    """A linear map, or two with a ReLU between."""
    if kind == "linear":
        return nn.Sequential(nn.Linear(wide, narrow))
    return nn.Sequential(nn.Linear(wide, hidden), nn.ReLU(), nn.Linear(hidden, narrow))


class _Upper:
    """The teacher's blocks between two of its states, to be run again on other states.

    What else the blocks are given (masks, position embeddings) is noted while the teacher runs.
    """

    def __init__(self, model: nn.Module, low: str, high: str, paths: list[str]) -> None:
        inside = paths[paths.index(low) + 1 : paths.index(high) + 1]
        self.blocks = [model.get_submodule(path) for path in inside]
        self.given: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note what the blocks are given inside."""

        def note(number: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
                self.given[number] = (args[1:] if args else (), rest)

            return hook

        handles = [
            block.register_forward_pre_hook(note(number), with_kwargs=True) for number, block in enumerate(self.blocks)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, states: Tensor, pooled: bool) -> Tensor:
        """States after the blocks; pooled ones are single positions, for which no mask is left."""
        for number, block in enumerate(self.blocks):
            args, kwargs = self.given[number]
            if pooled:
                args = tuple(None if isinstance(value, Tensor) else value for value in args)
                kwargs = {key: None if isinstance(value, Tensor) else value for key, value in kwargs.items()}
            out = block(states, *args, **kwargs)
            states = out if isinstance(out, Tensor) else out[0]
        return states


class Method(_terms.TermMethod):
    """Talking Models for models made of layers on sequences."""

    paper: ClassVar[str] = (
        "Zhao et al., Talking Models: Distill Pre-trained Knowledge to Downstream Models via Interactive Communication, 2023, arXiv 2310.03188"  # noqa: E501
    )
    tasks: ClassVar[frozenset[str]] = frozenset({"text-classification", "image-classification", "audio-classification"})
    batchwise: ClassVar[bool] = True
    combinable: ClassVar[bool] = False
    minimum: ClassVar[str] = "codecs start from random weights"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.student_taps = self._pair(self.student, self.config.student_layers, "student", 1)
        teacher: nn.Module = self.teacher_list[0].model
        self.teacher_taps = self._pair(teacher, self.config.teacher_layers, "teacher", 2)
        paths = stages_of(teacher)
        # in a tuple, so that the teacher's blocks do not become parts of this module
        self._upper = (_Upper(teacher, self.teacher_taps[0], self.teacher_taps[1], paths),)
        self._mask: Tensor | None = None
        self._other_tokens = False

    @staticmethod
    def _pair(model: nn.Module, wanted: list[int] | None, who: str, fewest: int) -> list[str]:
        """Paths of the low and the high layer.

        Raises:
            ConfigProblem: not two layers of the model in order.
        """
        paths = stages_of(model)
        count = len(paths)
        low, high = wanted if wanted is not None and len(wanted) == 2 else (max(1, round(count / 3)) - 1, count - 1)
        fits = 0 <= low < count and low <= high < count and high - low >= fewest - 1
        if not fits or (wanted is not None and len(wanted) != 2):
            raise ConfigProblem(
                f"talking-models needs a low and a high layer of the {who}, which has {count}",
                hint=f"--set method.{who}_layers=[0,{count - 1}]",
            )
        return [paths[low], paths[high]]

    def hear(self, batch: Batch) -> Side | None:
        """The teacher's states, and what its upper layers were given."""
        teacher: Any = self.teacher_list[0].model
        view = view_of(batch, 0)
        self._mask = view.get("attention_mask")
        # another tokenizer cuts elsewhere: equal lengths are then chance, not equal positions
        self._other_tokens = "input_ids" in view and view is not batch
        with taps(teacher, self.teacher_taps, self._classes(teacher)) as values, self._upper[0].listening():
            out = self.teach(batch, cached=False)
        return Side(out.logits, values, teacher)

    def build(self, student: Side, teacher: Side | None, data: Examples) -> None:
        """Codecs for the widths seen, from a generator state of their own.

        Raises:
            ConfigProblem: states that are no sequences, or change their width on the way.
        """
        assert teacher is not None
        widths = []
        for who, side, points in (("student", student, self.student_taps), ("teacher", teacher, self.teacher_taps)):
            low, high = (side.taps[point] for point in points)
            if low.ndim != 3 or low.shape != high.shape:
                raise ConfigProblem(
                    f"talking-models needs layers on sequences of one width, the {who} has {tuple(low.shape)} "
                    f"and {tuple(high.shape)}",
                    hint="it fits BERT-, ViT- and wav2vec2-like models; for CNNs take srrl, reviewkd or crd",
                )
            widths.append(low.shape[-1])
        try:
            self._upper[0].run(teacher.taps[self.teacher_taps[0]].float().mean(1, keepdim=True), True)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigProblem(
                "the teacher's layers cannot run on means over positions",
                why=str(error).split("\n", 1)[0],
                hint="take srrl, crd or a logit method",
            ) from None
        cfg = self.config
        message = cfg.message_dim or min(widths)
        devices = [student.logits.device] if student.logits.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            self.codecs = nn.ModuleDict(
                {
                    f"{kind}_{who}": codec(sizes[0], sizes[1], cfg.codec, message)
                    for who, width in zip("st", widths, strict=True)
                    for kind, sizes in (("enc", (width, message)), ("dec", (message, width)))
                }
            )

    def terms(self, student: Side, teacher: Side | None, labels: Tensor, batch: Batch, progress: float) -> list[Term]:
        """The three addends; sums over examples of means over the batch."""
        assert teacher is not None
        cfg, count = self.config, len(labels)
        states = [side.taps[point].float() for side, points in self._sides(student, teacher) for point in points]
        pooled = cfg.pool == "always" or self._other_tokens or states[0].shape[1] != states[2].shape[1]
        mask = None if self._mask is None or self._mask.shape[1] != states[2].shape[1] else self._mask.float()
        if pooled:
            masks = [batch.get("attention_mask"), self._mask]
            states = [_mean(x, masks[i // 2]) for i, x in enumerate(states)]
            mask = None
        states = [nn.functional.layer_norm(x, x.shape[-1:]) if x.shape[-1] > _WIDE else x for x in states]
        upper = self._upper[0]
        codecs = {name: self.codecs[name] for name in ("enc_s", "dec_s", "enc_t", "dec_t")}
        talk = converse(
            codecs,
            lambda x: upper.run(x, pooled),
            (states[0], states[1], states[2], states[3]),
            mask,
            cfg.rounds,
            cfg.stop_high,
        )
        warm = min(1.0, progress / cfg.interact_warmup) if cfg.interact_warmup else 1.0
        state = talk.own if cfg.state_consistency == "auto" else talk.state
        found = [
            Term("messages", cfg.message_weight, talk.message * count),
            Term("states", cfg.state_weight, state * count),
            Term("cka", 0.0, self._alignment(states, mask) * count),
        ]
        if cfg.rounds:
            found.insert(0, Term("interact", cfg.interact_weight * warm, talk.rounds.mean() * count))
        return found

    def _sides(self, student: Side, teacher: Side) -> list[tuple[Side, list[str]]]:
        return [(student, list(self.student_taps)), (teacher, list(self.teacher_taps))]

    @torch.no_grad()
    def _alignment(self, states: list[Tensor], mask: Tensor | None) -> Tensor:
        """How alike the two models' high messages are."""
        vectors = [_mean(self.codecs[name](states[i]), mask)[:, 0] for name, i in (("enc_s", 1), ("enc_t", 3))]
        return linear_cka(*vectors)


def _mean(states: Tensor, mask: Tensor | None) -> Tensor:
    """Means over positions [B, L, d] to [B, 1, d]; masked ones do not count where the mask is of these positions."""
    if mask is None or mask.shape[1] != states.shape[1]:
        return states.mean(1, keepdim=True)
    weight = mask.to(states.dtype).unsqueeze(-1)
    return (states * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
