"""Stands for the program `vllm`: serves sums on the port it is told, and notes what it was started with and asked.

FAKE_VLLM says how it goes: `serves`, `fails` to start, is `silent`, or `dies` after three answers.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

from tokenizers import Tokenizer

from tests.endpoint.server import Server


def solver(prompt: str, number: int) -> str:
    """A right answer to a question about a sum, of a teacher in two calls or of a mentor at once."""
    first, second = map(int, re.findall(r"What is (\d+) and (\d+)", prompt)[-1])
    if prompt.endswith("the answer is"):
        return f" {first + second}."
    return f" Count on to {first + second}, way {number}. --> {first + second}"


def main(how: str, notes: Path, words: list[str]) -> None:
    """Serve until the end."""
    options = dict(zip(words[2::2], words[3::2], strict=False))
    note = {"pid": os.getpid(), "words": words, "asked": []}
    path = notes / f"{len(list(notes.glob('*.json')))}.json"

    def put():
        path.with_suffix(".part").write_text(json.dumps(note))
        path.with_suffix(".part").replace(path)

    put()
    if how == "fails":
        print("INFO reading the model", "ValueError: no device was found", sep="\n", flush=True)
        sys.exit(3)
    if how == "silent":
        time.sleep(600)
    tokenizer = Tokenizer.from_file(str(Path(words[1]) / "tokenizer.json"))

    def write(ids, number):
        prompt = tokenizer.decode(ids, skip_special_tokens=True)
        with server.lock:
            note["asked"].append(ids)
            put()
        if how == "dies" and len(note["asked"]) > 3:
            print("RuntimeError: engine core died", flush=True)
            os._exit(1)
        return solver(prompt, number)

    time.sleep(0.2)  # nobody answers at first
    with Server(int(options["--port"])) as server:
        server.models, server.write = [options["--served-model-name"]], write
        print("INFO serving", flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main(os.environ["FAKE_VLLM"], Path(os.environ["FAKE_VLLM_NOTES"]), sys.argv[1:])
