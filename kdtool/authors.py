"""Who writes texts: a model in memory, or one behind an endpoint.

An order asks for some texts that go on from one prompt. Every text has a key, and all that shapes it is
a function of the key, the seed and the orders, so that writing can be cut off anywhere and taken up again.
"""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from kdtool.endpoint import Ask, EndpointRef, Sampling
from kdtool.errors import EndpointProblem, ModelProblem, UsageProblem
from kdtool.generation import (
    CachedModel,
    EncoderDecoder,
    Interleaving,
    Scorer,
    Source,
    StopStrings,
    Warp,
    generate,
    uniforms,
)
from kdtool.models import Loaded, weights_hash
from kdtool.run import Run
from kdtool.tasks._text import pad, padding_id
from kdtool.tasks._writing import opening

if TYPE_CHECKING:
    from kdtool.endpoint.serving import Serving

Key = tuple[int, ...]
"""Names a text: number of the question, number of the sample."""


@dataclass(frozen=True, slots=True)
class Order:
    """Texts asked for.

    Attributes:
        prompt: What they go on from.
        keys: One for each text.
    """

    prompt: str
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Style:
    """How texts are drawn.

    Attributes:
        seed: Of the draws.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Nucleus.
        max_tokens: Longest text, in the author's tokens.
        stop: Texts that end one, without belonging to it.
        chat: Whether the prompt is a message of a user, and the text the answer to it.
    """

    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    chat: bool = False


Done = Callable[[Order, list[str]], None]


class Author(Protocol):
    """Writes texts."""

    def facts(self) -> dict[str, Any]:
        """What names the author in the provenance of a text."""

    def write(self, orders: Sequence[Order], style: Style, known: Callable[[Order], bool], done: Done) -> None:
        """Write texts to orders, in any order.

        Args:
            orders: All orders of a stage, also when some were carried out before: their texts may depend on the whole.
            style: How to draw.
            known: Says which were.
            done: Takes the texts to an order, in this thread, as soon as they are there.
        """


class LocalAuthor:
    """A language model in memory; see `Author`.

    Orders are cut into batches of prompts of similar length that do not depend on what is known, so
    that a text is the same, to the last bit of rounding, whether it was written at once or after a break.

    Args:
        loaded: Model and tokenizer.
        run: Context.
        batch_size: Texts written at a time.
        prompts: From a prompt to its token ids; by default those of the tokenizer, with its first token in front.
    """

    def __init__(
        self,
        loaded: Loaded,
        run: Run,
        batch_size: int = 64,
        prompts: Callable[[Sequence[str]], list[list[int]]] | None = None,
    ) -> None:
        self.loaded = loaded
        self.run = run
        self.batch_size = batch_size
        self.prompts = prompts

    def facts(self) -> dict[str, Any]:
        """Reference, and commit or hash of the weights."""
        if self.loaded.revision is not None:
            return {"model": self.loaded.ref, "revision": self.loaded.revision}
        return {"model": self.loaded.ref, "weights": weights_hash(self.loaded.model)}

    def write(self, orders: Sequence[Order], style: Style, known: Callable[[Order], bool], done: Done) -> None:
        """Write batch by batch; batches with nothing new are passed over."""
        model: Any = self.loaded.model.to(self.run.device).eval()
        encoded = self.encoded([order.prompt for order in orders], style)
        for number, chosen in enumerate(batches := self._batches(orders, encoded)):
            if not all(known(orders[i]) for i in chosen):
                texts = iter(self._texts(model, [(encoded[i], key) for i in chosen for key in orders[i].keys], style))
                for i in chosen:
                    done(orders[i], [next(texts) for _ in orders[i].keys])
            self.run.reporter.progress("writing", number + 1, len(batches), {})

    def encoded(self, prompts: Sequence[str], style: Style) -> list[list[int]]:
        """Token ids of prompts, which leave room for a text.

        Raises:
            ModelProblem: one does not.
        """
        tokenizer = self.loaded.processor
        if self.prompts is not None:
            encoded = self.prompts(prompts)
        elif style.chat:
            talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
            if not getattr(tokenizer, "chat_template", None):
                raise ModelProblem(f"'{self.loaded.ref}' has no chat template", hint="leave out method.chat")
            written = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in talks]
            encoded = tokenizer(written, add_special_tokens=False)["input_ids"]
        else:
            begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
            encoded = [begin + ids for ids in tokenizer(list(prompts), add_special_tokens=False)["input_ids"]]
        longest = max(map(len, encoded), default=0)
        if longest + 1 > self.positions:
            raise ModelProblem(f"'{self.loaded.ref}' takes {self.positions} tokens, and a prompt has {longest}")
        return encoded

    @property
    def positions(self) -> float:
        """Most tokens that the model takes."""
        config: Any = self.loaded.model.config
        return getattr(config, "max_position_embeddings", None) or math.inf

    def _batches(self, orders: Sequence[Order], encoded: Sequence[Sequence[int]]) -> list[list[int]]:
        """Numbers of orders, batch by batch, long prompts first: what does not fit shows at once."""
        made: list[list[int]] = [[]]
        size = 0
        for i in sorted(range(len(orders)), key=lambda i: (-len(encoded[i]), i)):
            if made[-1] and size + len(orders[i].keys) > self.batch_size:
                made.append([])
                size = 0
            made[-1].append(i)
            size += len(orders[i].keys)
        return [batch for batch in made if batch]

    @torch.no_grad()
    def _texts(self, model: Any, rows: Sequence[tuple[Sequence[int], Key]], style: Style) -> list[str]:
        """Texts of a batch of (prompt, key)."""
        tokenizer, device = self.loaded.processor, self.run.device
        scorer, begun = self._given(model, [ids for ids, _ in rows])
        ids, mask = pad(begun, padding_id(tokenizer), left=True)
        limits = torch.tensor([int(min(style.max_tokens, self.positions - len(own))) for own in begun])
        uniform = uniforms([[style.seed, *key] for _, key in rows], int(limits.max()))
        end = tokenizer.eos_token_id
        settings = Interleaving(
            student=Warp(style.temperature, style.top_p),
            stop=() if end is None else (int(end),),
            stop_strings=StopStrings(tokenizer, style.stop) if style.stop else None,
            pad=padding_id(tokenizer),
        )
        out = generate(scorer, None, ids.to(device), mask.to(device), uniform, settings, limits)
        return [
            cut(tokenizer.decode(tokens[valid].tolist(), skip_special_tokens=True), style.stop)
            for tokens, valid in zip(out.tokens.cpu(), out.valid.cpu(), strict=True)
        ]

    def _given(self, model: Any, prompts: Sequence[Sequence[int]]) -> tuple[Scorer, list[np.ndarray]]:
        """What writes, and the tokens that each text goes on from: the prompts, unless an encoder reads them."""
        rows = [np.asarray(ids, dtype=np.int64) for ids in prompts]
        vocabulary = min(len(self.loaded.processor), len(model.get_output_embeddings().weight))
        if not model.config.is_encoder_decoder:
            return CachedModel(model, vocabulary), rows
        ids, mask = (value.to(self.run.device) for value in pad(rows, padding_id(self.loaded.processor)))
        return EncoderDecoder(model, Source(ids, mask), vocabulary), [np.array(opening(model))] * len(rows)


def cut(text: str, stop: Sequence[str]) -> str:
    """Text up to the first of some endings."""
    return text[: min((place for word in stop if (place := text.find(word)) >= 0), default=len(text))]


class EndpointAuthor:
    """A model behind an endpoint; see `Author`.

    Args:
        reference: Address and model.
        run: Context.
        tokens: From a prompt to its token ids and the most that may follow them; by default the server cuts the text.

    Raises:
        EndpointProblem, ModelProblem: the server is not there, or does not have the model.
    """

    def __init__(
        self, reference: EndpointRef, run: Run, tokens: Callable[[str], tuple[list[int], int]] | None = None
    ) -> None:
        from kdtool.endpoint.client import Endpoint

        self.reference = reference
        self.run = run
        self.tokens = tokens
        Endpoint(reference, run, Sampling()).check()

    def facts(self) -> dict[str, Any]:
        """Model and address; a server does not say which weights it runs."""
        return {"model": self.reference.model, "endpoint": self.reference.url}

    def write(self, orders: Sequence[Order], style: Style, known: Callable[[Order], bool], done: Done) -> None:
        """Ask for what is not known, some orders at a time."""
        from kdtool.endpoint.client import Endpoint, seeds

        open_ = [order for order in orders if not known(order)]
        sampling = Sampling(style.max_tokens, style.temperature, style.top_p, style.stop)
        finished = len(orders) - len(open_)

        def ask(order: Order) -> Ask:
            count, seed = len(order.keys), seeds(style.seed, order.keys[0])
            if self.tokens is not None:
                ids, room = self.tokens(order.prompt)
                return Ask(ids, count, seed, room)
            prompt = [{"role": "user", "content": order.prompt}] if style.chat else order.prompt
            return Ask(prompt, count, seed)

        def take(number: int, choices: Any) -> None:
            nonlocal finished
            finished += 1
            done(open_[number], [choice.text for choice in choices])
            self.run.reporter.progress("asking", finished, len(orders), {})

        Endpoint(self.reference, self.run, sampling).ask_all(map(ask, open_), take)


class ServedAuthor:
    """A model of this machine whose texts a `vllm serve` process writes, from the same tokens; see `Author`.

    Args:
        local: The model in memory, which makes the tokens of prompts.
        serving: Starts the server when there is something to write.

    Raises:
        UsageProblem: the model has an encoder.
    """

    def __init__(self, local: LocalAuthor, serving: "Serving") -> None:
        config: Any = local.loaded.model.config
        if config.is_encoder_decoder:
            raise UsageProblem(
                f"vllm does not serve encoder-decoders such as '{local.loaded.ref}'", hint="leave --generate-with out"
            )
        self.local, self.serving = local, serving

    def facts(self) -> dict[str, Any]:
        """As of the model in memory, and who writes."""
        return {**self.local.facts(), "written_by": "vllm"}

    def write(self, orders: Sequence[Order], style: Style, known: Callable[[Order], bool], done: Done) -> None:
        """Serve the model, and ask for what is not known.

        Raises:
            ModelProblem: the model is in no folder.
            EndpointProblem: the server ends, or refuses.
        """
        loaded, run = self.local.loaded, self.local.run
        if all(map(known, orders)):
            return
        if loaded.folder is None:
            raise ModelProblem(f"'{loaded.ref}' is in no folder that vllm could read", hint="save it first")
        prompts = [order.prompt for order in orders]
        tokens = dict(zip(prompts, self.local.encoded(prompts, style), strict=True))
        whole = max(map(len, tokens.values())) + style.max_tokens
        # twice, so that a second stage, whose prompts hold texts of the first, needs no other server
        needed, length = (int(min(self.local.positions, size)) for size in (whole, 2 * whole))
        loaded.model.to("cpu")  # the device is the server's meanwhile
        if run.device.startswith("cuda"):
            gc.collect()
            torch.cuda.empty_cache()

        def room(prompt: str) -> tuple[list[int], int]:
            return tokens[prompt], min(style.max_tokens, needed - len(tokens[prompt]))

        reference = self.serving.of(loaded.folder, needed, length)
        try:
            EndpointAuthor(reference, run, room).write(orders, style, known, done)
        except EndpointProblem:
            self.serving.check()
            raise


def provenance(facts: Mapping[str, Any], style: Style, prompt: str, key: Key) -> dict[str, Any]:
    """Where a text came from: everything that shaped it, and no time.

    Args:
        facts: What the author says of itself.
        style: How it drew.
        prompt: What it went on from.
        key: Of the text.
    """
    settings = asdict(style)
    settings["stop"] = list(style.stop)
    return {**facts, "prompt": prompt, "sample": key[-1], **settings}
