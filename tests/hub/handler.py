"""How the fixture Hub answers: one handler for all methods, a table of routes, a method for each."""

import base64
import json
import re
import time
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.state import STAMP, Commit, Repo, Request, User, git_oid, is_lfs, sha256


class Refuse(Exception):
    def __init__(self, status: int, code: str | None = None, message: str = "", **headers: str) -> None:
        self.status, self.code, self.message, self.headers = status, code, message, headers


class Cut(Exception):
    pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: without this each answer takes 40 ms
    server_hub: Any

    def log_message(self, *_: object) -> None:
        pass

    # one entry for all methods -------------------------------------------------------------------
    def handle_any(self) -> None:
        hub = self.server_hub
        body = self.read_body()
        self.sent = None
        with hub.lock:
            hub.log.append(Request(self.command, self.path, {k.title(): v for k, v in self.headers.items()}))
        self.fault = hub.take_fault(self.command, self.path)
        try:
            if self.fault:
                time.sleep(self.fault.delay)
                if self.fault.close:
                    raise Cut
                if self.fault.status:
                    raise Refuse(self.fault.status, None, "", **self.fault.headers)
            with hub.lock:
                self.route(body)
        except Refuse as no:
            headers = {"X-Error-Code": no.code, "X-Error-Message": no.message}
            given = {key: value for key, value in headers.items() if value}
            self.answer({"error": no.message or no.code}, no.status, {**given, **no.headers})
        except Cut:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            found = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = dict(headers or {})
        if self.fault is not None and self.fault.lose:
            raise Cut
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for key, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.cut is not None:
            self.wfile.write(content[: self.fault.cut])
            self.wfile.flush()
            self.connection.shutdown(2)
            raise Cut
        self.wfile.write(content)

    # who asks, and may they -----------------------------------------------------------------------
    def user(self) -> User | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not given:
            return None
        found = self.server_hub.users.get(given)
        if found is None:
            raise Refuse(401, None, "Invalid credentials in Authorization header")
        return found

    def may_write(self, repo: Repo, user: User | None) -> bool:
        return user is not None and user.role != "read" and repo.owner in (user.name, *user.orgs)

    def repo(self, kind: str, name: str, resolve: bool = False) -> Repo:
        hub, user = self.server_hub, self.user()
        if (kind, name) in hub.moved:
            raise Refuse(307, None, "", Location=self.path.replace(name, hub.moved[kind, name], 1))
        repo = hub.repos.get((kind, name))
        member = repo is not None and user is not None and repo.owner in (user.name, *user.orgs)
        if repo is None or (repo.private and not member and (user is None or user.name not in repo.granted)):
            raise Refuse(404 if user else 401, "RepoNotFound", "Repository not found")
        if repo.disabled:
            raise Refuse(403, None, "Access to this resource is disabled.")
        if resolve and repo.gated and not member and (user is None or user.name not in repo.granted):
            raise Refuse(403 if user else 401, "GatedRepo", "Access to this repository is restricted")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise Refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # routes ---------------------------------------------------------------------------------------
    def route(self, body: bytes) -> None:
        split = urlsplit(self.path)
        path, self.query = split.path, parse_qs(split.query)
        for pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                values = {key: unquote(value or "") for key, value in match.groupdict().items()}
                getattr(self, name)(body, **values)
                return
        raise Refuse(404, None, "no such endpoint")

    def whoami(self, body: bytes) -> None:
        user = self.user()
        if user is None:
            raise Refuse(401, None, "Invalid credentials in Authorization header")
        token = {"displayName": "test", "role": user.role}
        orgs = [{"type": "org", "name": org, "roleInOrg": "write"} for org in user.orgs]
        self.answer({"type": "user", "name": user.name, "orgs": orgs, "auth": {"type": "t", "accessToken": token}})

    def create(self, body: bytes) -> None:
        user, asked = self.user(), json.loads(body)
        if user is None or user.role == "read":
            raise Refuse(403 if user else 401, None, "You don't have the rights to create a repository")
        owner = asked.get("organization") or user.name
        if owner not in (user.name, *user.orgs):
            raise Refuse(403, None, "You don't have the rights to create a model under this namespace")
        name, kind = f"{owner}/{asked['name']}", f"{asked.get('type') or 'model'}s"
        url = f"{self.server_hub.url}/{name}"
        if (kind, name) in self.server_hub.repos:
            self.answer({"error": "exists", "url": url}, 409)
            return
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.server_hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, kind, private=private)
        self.answer({"url": url, "name": name, "id": name})

    def validate(self, body: bytes) -> None:
        errors = [{"message": text} for text in self.server_hub.card_errors]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def auth(self, body: bytes, kind: str, name: str, write: str) -> None:
        repo = self.repo(kind, name, resolve=True)
        if write and not self.may_write(repo, self.user()):
            raise Refuse(403, None, "You need write permission")
        self.answer({})

    def info(self, body: bytes, kind: str, name: str, rev: str = "") -> None:
        repo = self.repo(kind, name)
        commit = self.commit_of(repo, rev or "main")
        blobs = "blobs" in self.query
        siblings = []
        for path, content in commit.files.items():
            one: dict[str, Any] = {"rfilename": path}
            if blobs:
                one |= {"size": len(content), "blobId": git_oid(content)}
                if is_lfs(path, len(content)):
                    one["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 130}
            siblings.append(one)
        facts = {"private": repo.private, "gated": repo.gated, "disabled": repo.disabled, "tags": [], "downloads": 0}
        dates = {"lastModified": STAMP, "createdAt": STAMP, "likes": 0}
        self.answer({"id": repo.name, "sha": commit.oid, "siblings": siblings, **facts, **dates})

    def tree(self, body: bytes, kind: str, name: str, rev: str, path: str = "") -> None:
        commit = self.commit_of(self.repo(kind, name), rev)
        prefix = f"{path}/" if path else ""
        inside = {p: c for p, c in commit.files.items() if p.startswith(prefix)}
        if path and not inside:
            raise Refuse(404, "EntryNotFound", f"{path} does not exist", **{"X-Repo-Commit": commit.oid})
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        rows: dict[str, dict[str, Any]] = {}
        for full, content in inside.items():
            steps = full.removeprefix(prefix).split("/")
            for depth in range(1, len(steps)):
                folder = prefix + "/".join(steps[:depth])
                if deep or depth == 1:
                    rows[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
            if deep or len(steps) == 1:
                row = {"type": "file", "path": full, "size": len(content), "oid": git_oid(content)}
                if is_lfs(full, len(content)):
                    row["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
                rows[full] = row
        self.answer(list(rows.values()))

    def resolve(self, body: bytes, name: str, rev: str, path: str, kind: str = "") -> None:
        kind = (kind or "models").rstrip("/")
        commit = self.commit_of(self.repo(kind, name, resolve=True), rev)
        content = commit.files.get(path)
        head = {"X-Repo-Commit": commit.oid}
        if content is None:
            raise Refuse(404, "EntryNotFound", f"{path} does not exist", **head)
        if is_lfs(path, len(content)):
            head |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
            head["ETag"] = head["X-Linked-Etag"]
            if self.server_hub.cdn:
                self.answer(b"", 302, {**head, "Location": f"{self.server_hub.cdn}/cdn/{sha256(content)}"})
                self.server_hub.objects[sha256(content)] = content
                return
        else:
            head["ETag"] = f'"{git_oid(content)}"'
        self.ranged(content, head)

    def served(self, body: bytes, oid: str) -> None:
        self.ranged(self.server_hub.objects[oid], {})

    def ranged(self, content: bytes, head: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match and self.command == "GET":
            start, end = int(match[1]), int(match[2] or len(content) - 1)
            part = content[start : end + 1]
            span = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
            self.answer(part, 206, {**head, "Content-Range": span, "Accept-Ranges": "bytes"})
            return
        self.answer(content, 200, {**head, "Accept-Ranges": "bytes"})

    def refs(self, body: bytes, kind: str, name: str) -> None:
        repo = self.repo(kind, name)
        branches = [
            {"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid}
            for n, oid in repo.refs.items()
            if not n.startswith("refs/")
        ]
        self.answer({"branches": branches, "tags": [], "converts": []})

    def branch(self, body: bytes, kind: str, name: str, branch: str) -> None:
        repo = self.repo(kind, name)
        repo.refs[branch] = self.commit_of(repo, json.loads(body or b"{}").get("startingPoint") or "main").oid
        self.answer({})

    def discussions(self, body: bytes, kind: str, name: str) -> None:
        self.answer({"discussions": self.repo(kind, name).requests, "count": 0, "start": 0})

    # writing --------------------------------------------------------------------------------------
    def writable(self, kind: str, name: str) -> Repo:
        repo, user = self.repo(kind, name), self.user()
        proposing = "create_pr" in self.query and user is not None and user.role != "read"
        if not proposing and not self.may_write(repo, user):
            raise Refuse(403, None, "You don't have permission to write to this repository")
        return repo

    def preupload(self, body: bytes, kind: str, name: str, rev: str) -> None:
        commit = self.commit_of(self.writable(kind, name), rev)
        rows = []
        for file in json.loads(body)["files"]:
            lfs = is_lfs(file["path"], file["size"])
            there = commit.files.get(file["path"])
            oid = None if there is None else sha256(there) if lfs else git_oid(there)
            mode = "lfs" if lfs else "regular"
            rows.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": rows})

    def batch(self, body: bytes, name: str, kind: str = "") -> None:
        hub, rows = self.server_hub, []
        for one in json.loads(body)["objects"]:
            row = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in hub.objects:
                base = f"{hub.url}/lfs/{one['oid']}"
                upload: dict[str, Any] = {"href": base, "header": {}}
                if hub.chunk and one["size"] > hub.chunk:
                    count = -(-one["size"] // hub.chunk)
                    parts = {str(n): f"{base}/part/{n}" for n in range(1, count + 1)}
                    upload = {"href": f"{base}/complete", "header": {"chunk_size": str(hub.chunk), **parts}}
                row["actions"] = {"upload": upload, "verify": {"href": f"{base}/verify"}}
            rows.append(row)
        multi = any("chunk_size" in r.get("actions", {}).get("upload", {}).get("header", {}) for r in rows)
        self.answer({"transfer": "multipart" if multi else "basic", "objects": rows})

    def store(self, body: bytes, oid: str) -> None:
        if sha256(body) != oid:
            raise Refuse(400, None, "content does not match")
        self.server_hub.objects[oid] = body
        self.answer(b"")

    def part(self, body: bytes, oid: str, number: str) -> None:
        self.server_hub.parts[oid, int(number)] = body
        self.answer(b"", 200, {"ETag": f'"{sha256(body)[:32]}"'})

    def complete(self, body: bytes, oid: str) -> None:
        parts = self.server_hub.parts
        numbers = sorted(part["partNumber"] for part in json.loads(body)["parts"])
        self.store(b"".join(parts[oid, number] for number in numbers), oid)

    def verify(self, body: bytes, oid: str) -> None:
        if oid not in self.server_hub.objects:
            raise Refuse(404, None, "not stored")
        self.answer({})

    def commit(self, body: bytes, kind: str, name: str, rev: str) -> None:
        repo = self.writable(kind, name)
        parent = self.commit_of(repo, rev)
        lines = [json.loads(line) for line in body.splitlines() if line]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, parent.oid):
            raise Refuse(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server_hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refuse(404, "EntryNotFound", "A file with this name doesn't exist")
            elif line["key"] == "deletedFolder":
                files = {p: c for p, c in files.items() if not p.startswith(value["path"].rstrip("/") + "/")}
        found: dict[str, Any] = {}
        ref = rev
        if "create_pr" in self.query:
            number = len(repo.requests) + 1
            user, ref = self.user(), f"refs/pr/{number}"
            assert user is not None
            found["pullRequestUrl"] = f"{self.server_hub.url}/{name}/discussions/{number}"
            repo.requests.append(
                {
                    "num": number,
                    "title": header["summary"],
                    "status": "open",
                    "isPullRequest": True,
                    "author": {"name": user.name},
                    "createdAt": STAMP,
                    "repo": {"name": name, "type": "model"},
                }
            )
        oid = repo.commit(files, header["summary"], ref)
        self.answer({"commitUrl": f"{self.server_hub.url}/{name}/commit/{oid}", "commitOid": oid, **found})


_KIND = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+(/[^/]+)?)"
_LFS = r"/lfs/(?P<oid>\w+)"
ROUTES = [
    (r"/api/whoami-v2", "whoami"),
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "validate"),
    (_KIND + r"/auth-check(?P<write>/write)?", "auth"),
    (_KIND + r"/revision/(?P<rev>.+)", "info"),
    (_KIND + r"/tree/(?P<rev>[^/]+)(/(?P<path>.+))?", "tree"),
    (_KIND + r"/preupload/(?P<rev>[^/]+)", "preupload"),
    (_KIND + r"/commit/(?P<rev>[^/]+)", "commit"),
    (_KIND + r"/branch/(?P<branch>.+)", "branch"),
    (_KIND + r"/refs", "refs"),
    (_KIND + r"/discussions", "discussions"),
    (_KIND, "info"),
    (r"/(?P<kind>datasets/)?(?P<name>[^/]+(/[^/]+)?)\.git/info/lfs/objects/batch", "batch"),
    (r"/(?P<kind>datasets/)?(?P<name>[^/]+(/[^/]+)?)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
    (r"/cdn/(?P<oid>\w+)", "served"),
    (_LFS, "store"),
    (_LFS + r"/part/(?P<number>\d+)", "part"),
    (_LFS + r"/complete", "complete"),
    (_LFS + r"/verify", "verify"),
]
