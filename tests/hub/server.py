"""A Hub on loopback: repositories in memory, the answers and faults of the real one, a log of all requests."""

import re
import threading
from http.server import ThreadingHTTPServer
from typing import Any

from tests.hub.handler import Handler
from tests.hub.state import Fault, Repo, Request, User

__all__ = ["Fault", "Hub", "Repo", "Request", "User"]


class Hub:
    """The server; use as a context manager."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.moved: dict[tuple[str, str], str] = {}
        self.users: dict[str, User] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.chunk = 0  # multipart above this many bytes; 0 is off
        self.cdn: str | None = None  # address that large files are served from
        self.card_errors: list[str] = []
        self.lock = threading.RLock()
        hub = self

        class Bound(Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def reset(self) -> None:
        for held in (self.repos, self.moved, self.users, self.faults, self.log, self.objects, self.parts):
            held.clear()
        self.chunk, self.cdn, self.card_errors = 0, None, []

    def add(self, name: str, files: dict[str, bytes], kind: str = "models", **facts: Any) -> Repo:
        repo = Repo(name, kind, **facts)
        repo.commit(files)
        self.repos[kind, name] = repo
        return repo

    def fail(self, path: str, **how: Any) -> Fault:
        fault = Fault(path, **how)
        self.faults.append(fault)
        return fault

    def asked(self, path: str = "", method: str = "") -> list[Request]:
        return [r for r in self.log if re.search(path, r.path) and (not method or r.method == method)]

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None
