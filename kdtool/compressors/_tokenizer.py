"""Trimming a tokenizer.json: which tokens must stay, and the file without the others.

What is cut in the same way after it as before: a text all of whose tokens stay. WordPiece takes the longest
token that fits, and Unigram the best path, so fewer rivals change nothing; byte-pair encoding needs every
merge on the way to a token, so the parts of a token stay with it.
"""

import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kdtool.errors import ModelProblem

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_OTHER_FILES = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
Spec = dict[str, Any]


def read_spec(tokenizer: Any, ref: str) -> Spec:
    """The tokenizer.json of a tokenizer.

    Raises:
        ModelProblem: it has none, or one of a kind that cannot be trimmed.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelProblem(f"vocab: the tokenizer of '{ref}' has no tokenizer.json, which is what is trimmed")
    spec: Spec = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] not in ("WordPiece", "BPE", "Unigram", "WordLevel"):
        raise ModelProblem(f"vocab: a tokenizer of type {model['type']} cannot be trimmed")
    if model["type"] == "BPE" and model.get("continuing_subword_prefix"):
        raise ModelProblem("vocab: byte-pair encoding with a prefix inside words cannot be trimmed")
    return spec


def tokens_of(spec: Spec) -> dict[str, int]:
    """Every token with its number, added ones included."""
    vocabulary = spec["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    return {**vocabulary, **{added["content"]: added["id"] for added in spec["added_tokens"]}}


def needed(spec: Spec) -> set[int]:
    """Tokens without which some text could not be encoded, or not as well: added ones, characters, bytes.

    Those that a post-processor names stay, too, whether it uses them or not.
    """
    model, tokens = spec["model"], tokens_of(spec)
    stay = {added["id"] for added in spec["added_tokens"]} | {ids[i] for ids, i in _places(spec.get("post_processor"))}
    if model.get("unk_id") is not None:
        stay.add(model["unk_id"])
    if model.get("unk_token") in tokens:
        stay.add(tokens[model["unk_token"]])
    if model["type"] == "WordLevel":
        return stay
    prefix = (model.get("continuing_subword_prefix") or "") if model["type"] == "WordPiece" else ""
    suffix = model.get("end_of_word_suffix") or ""
    for token, number in tokens.items():
        bare = token.removeprefix(prefix) if prefix else token
        bare = bare.removesuffix(suffix) if suffix else bare
        if len(bare) <= 1 or _BYTE.fullmatch(token):
            stay.add(number)
    return stay


def parts_of(spec: Spec) -> Callable[[int], set[int]]:
    """A function from a token to all tokens on the way to it, itself included."""
    model, tokens = spec["model"], tokens_of(spec)
    if model["type"] != "BPE":
        return lambda number: {number}
    names = {number: token for token, number in tokens.items()}
    ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
    suffix = model.get("end_of_word_suffix") or ""

    def parts(number: int) -> set[int]:
        token = names[number]
        symbols = list(token.removesuffix(suffix)) if suffix else list(token)
        if suffix and token.endswith(suffix) and symbols:
            symbols[-1] += suffix
        found = {number}
        while len(symbols) > 1:
            ranked = [(ranks.get((a, b)), i) for i, (a, b) in enumerate(itertools.pairwise(symbols))]
            best = min(((rank, i) for rank, i in ranked if rank is not None), default=None)
            if best is None:
                break
            i = best[1]
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            found.add(tokens[symbols[i]])
        return found

    return parts


def _pair(merge: Any) -> tuple[str, str]:
    """A merge, written as a pair or, in older files, with a space."""
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return first, second


def trim(spec: Spec, numbers: Mapping[int, int]) -> Spec:
    """A tokenizer.json with fewer tokens.

    Args:
        spec: The whole one.
        numbers: Old number of each token that stays to its new one.
    """
    trimmed: Spec = json.loads(json.dumps(spec))
    model = trimmed["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in numbers]
        model["unk_id"] = None if model.get("unk_id") is None else numbers[model["unk_id"]]
    else:
        model["vocab"] = {token: numbers[i] for token, i in model["vocab"].items() if i in numbers}
    if model["type"] == "BPE":
        stay = model["vocab"]
        pairs = [(merge, *_pair(merge)) for merge in model["merges"]]
        model["merges"] = [merge for merge, a, b in pairs if a in stay and b in stay and a + b in stay]
    for added in trimmed["added_tokens"]:
        added["id"] = numbers[added["id"]]
    if trimmed.get("padding"):
        trimmed["padding"]["pad_id"] = numbers[trimmed["padding"]["pad_id"]]
    for ids, i in _places(trimmed.get("post_processor")):
        ids[i] = numbers[ids[i]]
    return trimmed


def _places(node: Any) -> Iterator[tuple[list[Any], int]]:
    """Where post-processors name special tokens by number: `ids` of a template, `sep` and `cls` of the older kinds."""
    if isinstance(node, list):
        for item in node:
            yield from _places(item)
    for key, value in node.items() if isinstance(node, dict) else ():
        if key == "ids" and isinstance(value, list):
            yield from ((value, i) for i in range(len(value)))
        elif key in ("sep", "cls") and isinstance(value, list) and len(value) == 2:
            yield value, 1
        else:
            yield from _places(value)


def with_spec(tokenizer: Any, spec: Spec, numbers: Mapping[int, int]) -> Any:
    """The same kind of tokenizer with another tokenizer.json."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer.save_pretrained(folder)
        for name in _OTHER_FILES:
            (folder / name).unlink(missing_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        path = folder / "tokenizer_config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        decoder = values.get("added_tokens_decoder")
        if decoder:
            values["added_tokens_decoder"] = {str(numbers[int(i)]): token for i, token in decoder.items()}
        path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
        made = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    made.name_or_path = ""  # a folder that is gone
    return made


def closed(chosen: Iterable[int], parts: Callable[[int], set[int]], limit: int, stay: set[int]) -> set[int]:
    """Tokens in the order of their worth, each with its parts, as long as there is room.

    Args:
        chosen: Tokens, the best first.
        parts: See `parts_of`.
        limit: Largest number of tokens.
        stay: Those that stay anyway.
    """
    kept = set(stay)
    for number in chosen:
        more = parts(number) - kept
        if len(kept) + len(more) <= limit:
            kept |= more
    return kept
