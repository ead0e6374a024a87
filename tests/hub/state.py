"""What a fixture Hub holds: repositories, users, faults, requests."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

STAMP = "2026-01-02T03:04:05.000Z"
LFS_SUFFIXES = (".safetensors", ".bin", ".onnx", ".gguf", ".parquet", ".arrow")
LFS_BYTES = 1 << 20


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LFS_BYTES


@dataclass
class Commit:
    oid: str
    files: dict[str, bytes]
    title: str


@dataclass
class Repo:
    """A repository; `refs` maps branches, tags and refs/pr/N to commits, newest last in `commits`."""

    name: str
    kind: str = "models"
    private: bool = False
    gated: bool | str = False
    disabled: bool = False
    granted: set[str] = field(default_factory=set)
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], title: str = "initial", ref: str = "main") -> str:
        oid = hashlib.sha1(f"{self.kind}{self.name}{len(self.commits)}{title}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, dict(files), title)
        self.refs[ref] = oid
        return oid

    @property
    def owner(self) -> str:
        return self.name.partition("/")[0]

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


@dataclass
class User:
    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose method and path match."""

    path: str
    method: str = "GET|HEAD|POST|PUT"
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # bytes of the body that still arrive
    close: bool = False  # no answer at all
    lose: bool = False  # done, but the answer is lost
    delay: float = 0.0


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
