"""`vllm serve` as a process of this one: started on a free port, waited for, and ended in every case."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx2

from kdtool.endpoint.reference import EndpointRef
from kdtool.errors import EndpointProblem, UsageProblem
from kdtool.hub.retry import seconds
from kdtool.run import Run

PROGRAM = "vllm"
START = "KDTOOL_VLLM_START"
_HOST = "127.0.0.1"
_NAME = "served"
_DEADLINE = 1800.0  # a large model is read, and its kernels are compiled
_PATIENCE = 30.0  # seconds to end in good order
_LAUNCHER = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TAIL = 2**14


def program() -> str:
    """Path of the program.

    Raises:
        UsageProblem: it is not installed.
    """
    found = shutil.which(PROGRAM)
    if found is None:
        raise UsageProblem(
            f"--generate-with vllm: there is no program '{PROGRAM}'",
            hint="install vllm in an environment of its own and put that on PATH, or leave --generate-with out",
        )
    return found


class Serving:
    """Serves one model at a time; use as a context manager, which ends what still runs.

    Args:
        run: Gives device and number format; hears of the wait.
        log: File to which the server's output is appended.
    """

    def __init__(self, run: Run, log: Path) -> None:
        self.run, self.log = run, log
        self._process: subprocess.Popen[bytes] | None = None
        self._served: tuple[Path, int, EndpointRef] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.end()

    def of(self, folder: Path, needed: int, length: int) -> EndpointRef:
        """Where a model is served, starting its server in the place of another one's.

        Args:
            folder: The model.
            needed: Tokens that prompt and text may have together.
            length: How many a server that is started now shall take.

        Raises:
            EndpointProblem: the server ended, or did not answer in KDTOOL_VLLM_START seconds (default 1800).
            UsageProblem: the program is not installed.
        """
        if self._served is not None and self._served[0] == folder and self._served[1] >= needed:
            return self._served[2]
        self.end()
        reference = EndpointRef(f"http://{_HOST}:{_free_port()}/v1", _NAME)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            # a session of its own: Ctrl-C is for this process, which then ends that one and its children
            self._process = subprocess.Popen(
                [program(), *self._arguments(folder, length, reference)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
        self._wait(reference, folder)
        self._served = (folder, length, reference)
        return reference

    def _arguments(self, folder: Path, length: int, reference: EndpointRef) -> list[str]:
        port = reference.url.removesuffix("/v1").rpartition(":")[2]
        words = ["serve", str(folder.absolute()), "--host", _HOST, "--port", port, "--served-model-name", _NAME]
        words += ["--dtype", self.run.dtype or "float32", "--max-model-len", str(length), "--seed", str(self.run.seed)]
        # without the model's own settings of sampling, which nobody asked for
        words += ["--generation-config", "vllm"]
        return words + (["--trust-remote-code"] if self.run.trust_remote_code else [])

    def _environment(self) -> dict[str, str]:
        """That of this process, without its place in a job of several, on the same device, asking no network."""
        values = {name: value for name, value in os.environ.items() if name not in (*_LAUNCHER, "VLLM_API_KEY")}
        kind, _, number = self.run.device.partition(":")
        if kind == "cuda" and number:
            visible = [name for name in values.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            values["CUDA_VISIBLE_DEVICES"] = visible[int(number)] if visible else number
        return values | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

    def _wait(self, reference: EndpointRef, folder: Path) -> None:
        """Until it answers."""
        began, deadline = time.monotonic(), seconds(START, _DEADLINE)
        self.run.reporter.info(f"vllm reads {folder.name}; its log is {self.log}")
        while not _answers(reference):
            self.check("before it answered")
            elapsed = time.monotonic() - began
            if elapsed > deadline:
                self.end()
                raise EndpointProblem(
                    f"vllm did not answer in {deadline:g} s",
                    why=self._last(),
                    hint=f"set {START} to more seconds; its log is {self.log}",
                )
            self.run.reporter.progress("waiting for vllm, seconds", int(elapsed), 0, {})
            time.sleep(min(1.0, 0.05 + elapsed / 10))

    def check(self, when: str = "while it wrote") -> None:
        """See whether it still runs.

        Raises:
            EndpointProblem: it does not.
        """
        code = None if self._process is None else self._process.poll()
        if code is not None:
            self.end()
            hint = f"its log is {self.log}; without --generate-with vllm the model writes in this process"
            raise EndpointProblem(f"vllm ended with {code} {when}", why=self._last(), hint=hint)

    def _last(self) -> str | None:
        """Last line of the log."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - _TAIL))
            lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines()]
        return next((line[:300] for line in reversed(lines) if line), None)

    def end(self) -> None:
        """End the server, and what it started."""
        process, self._process, self._served = self._process, None, None
        if process is None:
            return
        try:
            _signal(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE)
        finally:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """To all processes of a session; nothing where none is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((_HOST, 0))
        return int(found.getsockname()[1])


def _answers(reference: EndpointRef) -> bool:
    """Whether a server lists its models there."""
    try:
        with httpx2.Client(trust_env=False, timeout=5.0) as client:
            return bool(client.get(f"{reference.url}/models").status_code == 200)
    except httpx2.RequestError:
        return False
