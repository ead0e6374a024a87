"""The fixture Hub, clients pointed at it in this process, and the command line as a process."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http

from kdtool.run import Run
from tests.hub.server import Hub, User

TOKEN = "secret-of-ada-0123456789"
READER = "secret-of-reader-0123456789"
STRANGER = "secret-of-stranger-0123456789"
_CLEARED = ("KDTOOL_", "HF_", "HUGGING", "TRANSFORMERS_", "XDG_")


class Listener:
    """A reporter that keeps what it hears."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def info(self, message: str) -> None:
        self.lines.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def progress(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def _server() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def hub(_server: Hub) -> Iterator[Hub]:
    """An empty Hub with three users."""
    _server.reset()
    _server.users |= {TOKEN: User("ada", orgs=("lab",)), READER: User("ada", "read"), STRANGER: User("bob")}
    yield _server
    _server.reset()


def point(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Make the client, which reads its settings on import, talk to `url` and keep its files in `cache`."""
    for module in (constants, hf_api):
        monkeypatch.setattr(module, "ENDPOINT", url, raising=False)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))


@pytest.fixture
def near(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """A run whose Hub is the fixture; the client's own waits are cut short."""
    for name in [name for name in os.environ if name.startswith(_CLEARED)]:
        monkeypatch.delenv(name)
    point(monkeypatch, hub.url, tmp_path / "home")
    monkeypatch.setenv("KDTOOL_HUB_BACKOFF", "0.01")

    class Impatient:
        sleep = staticmethod(lambda seconds: None)

        def __getattr__(self, name: str) -> Any:
            return getattr(time, name)

    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", Impatient())
    return Run(reporter=Listener())


Done = subprocess.CompletedProcess[str]


def environment(url: str, home: Path, token: str | None, more: dict[str, str]) -> dict[str, str]:
    """The environment of a user of the fixture."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_CLEARED)}
    ours = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "XDG_CACHE_HOME": str(home / "xdg"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "KDTOOL_HUB_BACKOFF": "0.01",
        "OMP_NUM_THREADS": "1",
    }
    return kept | ours | ({"HF_TOKEN": token} if token else {}) | more


@pytest.fixture
def process(hub: Hub, tmp_path: Path) -> Callable[..., Done]:
    """The command line as a process of its own, whose Hub is the fixture."""

    def call(*words: str, token: str | None = None, url: str | None = None, **more: str) -> Done:
        return subprocess.run(
            [sys.executable, "-m", "kdtool", *words],
            env=environment(url or hub.url, tmp_path / "home", token, more),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    return call


@pytest.fixture(scope="session")
def _zygote(_server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    home = tmp_path_factory.mktemp("zygote") / "home"
    with subprocess.Popen(
        [sys.executable, "-m", "tests.hub.zygote"],
        env=environment(_server.url, home, None, {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process, home
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def cli(hub: Hub, _zygote: tuple[Any, Path], tmp_path: Path) -> Callable[..., Done]:
    """The command line in a fork of a process that has the libraries loaded; its address cannot be changed."""
    process, home = _zygote
    shutil.rmtree(home, ignore_errors=True)

    def call(*words: str, token: str | None = None, **more: str) -> Done:
        out, err = tmp_path / "stdout.txt", tmp_path / "stderr.txt"
        env = ({"HF_TOKEN": token} if token else {}) | more
        asked = {"args": words, "env": env, "cwd": str(tmp_path), "out": str(out), "err": str(err)}
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        code = int(process.stdout.readline())
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())

    call.home = home  # type: ignore[attr-defined]
    return call


def files_of(folder: Path) -> dict[str, bytes]:
    """A folder as the content of a repository."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SMALL = {
    "config.json": json.dumps({"model_type": "bert", "architectures": ["BertForSequenceClassification"]}).encode(),
    "model.safetensors": bytes(range(256)) * 40,
    "tokenizer.json": b"{}",
    "README.md": b"# small\n",
    "onnx/model.onnx": b"not wanted",
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
}
"""A repository in the form of a model, for tests that only fetch."""
