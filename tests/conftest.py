"""One thread, no network, and the tiny models and data that many tests share."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: its pool of threads is made once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import signal
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

_LOCAL = {"127.0.0.1", "::1", "localhost"}
_connect = socket.socket.connect


def _refuse(self: socket.socket, address: object) -> None:
    host = address[0] if isinstance(address, tuple) else None
    if self.family != socket.AF_UNIX and host not in _LOCAL:
        raise RuntimeError(f"a test asks the network: {address}")
    _connect(self, address)


socket.socket.connect = _refuse  # type: ignore[method-assign]


def pytest_configure() -> None:
    """A shell that starts the tests in the background ignores Ctrl-C, and so would they and all they start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Thousands of tests and all of torch stay: the collector of garbage need not look through them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Sums of one thread are the same on every machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`models(NAME)`: the folder of a tiny model, made once; tests must not write into it.

    Names: bert, bert-small, bert-permuted, vit, vit-one, vit-small, resnet, wav2vec, wav2vec-small,
    tabular, tabular-small, llama, llama-one, llama-small, llama-bytes, llama-padded, t5, t5-small, bart, bart-small,
    masked, masked-small.
    """
    from tests import tiny

    root = tmp_path_factory.mktemp("models")
    makers: dict[str, Callable[[Path], Path]] = {
        "bert": tiny.bert,
        "bert-small": lambda folder: tiny.bert(folder, layers=2, seed=2),
        "bert-permuted": lambda folder: tiny.bert(folder, layers=2, labels=["so so", "bad", "good"], seed=3),
        "vit": tiny.vit,
        "vit-one": lambda folder: tiny.vit(folder, layers=1, seed=2),
        "vit-small": lambda folder: tiny.vit(folder, layers=2, seed=2),
        "resnet": tiny.resnet,
        "wav2vec": tiny.wav2vec,
        "wav2vec-small": lambda folder: tiny.wav2vec(folder, layers=1, seed=2),
        "tabular": tiny.tabular,
        "tabular-small": lambda folder: tiny.tabular(folder, layers=1, seed=2),
        "llama": tiny.llama,
        "llama-one": lambda folder: tiny.llama(folder, layers=1, seed=2),
        "llama-small": lambda folder: tiny.llama(folder, layers=2, seed=2),
        "llama-bytes": tiny.byte_llama,
        "llama-padded": lambda folder: tiny.llama(folder, layers=2, seed=4, padding=5),
        "t5": tiny.t5,
        "t5-small": lambda folder: tiny.t5(folder, layers=1, seed=2),
        "bart": tiny.bart,
        "bart-small": lambda folder: tiny.bart(folder, layers=1, seed=2),
        "masked": tiny.masked_bert,
        "masked-small": lambda folder: tiny.masked_bert(folder, layers=2, seed=2),
    }

    @cache
    def make(name: str) -> Path:
        return makers[name](root / name)

    return make


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`data(NAME)`: a tiny data folder, made once: text, pairs, images, audio, table, plain, prompts."""
    from tests import tiny

    root = tmp_path_factory.mktemp("data")
    makers: dict[str, Callable[[Path], Path]] = {
        "text": tiny.text_data,
        "pairs": lambda folder: tiny.text_data(folder, pairs=True),
        "images": tiny.image_data,
        "audio": tiny.audio_data,
        "table": tiny.table_data,
        "plain": tiny.plain_text,
        "prompts": tiny.prompt_data,
    }

    @cache
    def make(name: str) -> Path:
        return makers[name](root / name)

    return make
