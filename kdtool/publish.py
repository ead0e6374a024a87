"""Publishing a result folder on the Hub: permission checked before any work, then one commit with all files."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kdtool
from kdtool.errors import HubProblem
from kdtool.hub.problems import CONNECTION_HINT, clean, explain, status_of
from kdtool.hub.retry import Patience, attempt
from kdtool.run import Run

_TIMEOUT = 30.0
_STALE = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*")
_NO_TOKEN = "set HF_TOKEN, pass --token, or run: hf auth login"  # noqa: S105 - advice, no token


def check_write_access(repo: str, run: Run, private: bool | None = None, create_pr: bool = False) -> str:
    """Make sure that a result can be published, before any work is done for it.

    Args:
        repo: `owner/name`, or `name` for one of your own.
        run: Context.
        private: Whether the repository is to be private; None takes what is there, or the account's default.
        create_pr: A pull request only needs the right to read.

    Returns:
        The full id of the repository, which may not exist yet.

    Raises:
        HubProblem: no token, a token that may not write, a repository of others, or a public
            repository for a private result.
    """
    from huggingface_hub import HfApi, get_token, is_offline_mode

    if run.offline or is_offline_mode():
        raise HubProblem(f"cannot publish to '{repo}': offline is set", hint="leave out --push, or --offline")
    if get_token() is None:
        raise HubProblem(f"publishing to '{repo}' needs a token", hint=_NO_TOKEN)
    api = HfApi()
    who = _ask(lambda: api.whoami(), run, repo)
    if _role(who) == "read":
        raise HubProblem(
            f"your token may only read, not publish to '{repo}'", hint="make a token with the role write, and pass it"
        )
    full = repo if "/" in repo else f"{who['name']}/{repo}"
    info = _existing(full, run)
    if info is None:
        _check_namespace(full, who, "make repositories")
        return full
    if private and not info.private:
        raise HubProblem(
            f"repository '{full}' is public, and the result is to be private",
            hint="name another repository with --push, or change its visibility first",
        )
    if not create_pr:
        _check_write(str(info.id), who, run)
    return str(info.id)


def _ask(call: Any, run: Run, repo: str) -> Any:
    """Ask the Hub, in our words when it fails."""
    try:
        return attempt(call, run, f"repository '{repo}'")
    except Exception as error:
        if status_of(error) == 401:
            raise HubProblem(
                "the Hub does not accept this token", why=clean(str(error)), hint=f"make a new one: {_NO_TOKEN}"
            ) from None
        problem = explain(error, "repository", repo)
        if problem is None:
            raise
        raise problem from None


def _role(who: Mapping[str, Any]) -> str:
    token = (who.get("auth") or {}).get("accessToken") or {}
    return str(token.get("role", "write"))


def _existing(repo: str, run: Run) -> Any:
    """Facts of a repository; None when there is none that this token may see."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def look() -> Any:
        try:
            return HfApi().model_info(repo, timeout=_TIMEOUT)
        except RepositoryNotFoundError as error:
            if isinstance(error, GatedRepoError):
                raise
            return None

    return _ask(look, run, repo)


def _namespaces(who: Mapping[str, Any]) -> set[str]:
    """Accounts in whose name this token may act."""
    orgs = [org for org in who.get("orgs") or () if org.get("roleInOrg", "write") != "read"]
    return {str(account["name"]).lower() for account in (who, *orgs)}


def _check_namespace(repo: str, who: Mapping[str, Any], what: str) -> None:
    owner = repo.partition("/")[0]
    if owner.lower() not in _namespaces(who):
        raise HubProblem(
            f"you may not {what} in the name of '{owner}'",
            why=f"the token belongs to '{who['name']}'",
            hint=f"--push {who['name']}/{repo.partition('/')[2]}, or --create-pr for a repository of others",
        )
    token = (who.get("auth") or {}).get("accessToken") or {}
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if _role(who) == "fineGrained" and scopes is not None:
        rights = {
            str(right)
            for scope in scopes
            if str((scope.get("entity") or {}).get("name", "")).lower() in (owner.lower(), repo.lower())
            for right in scope.get("permissions") or ()
        }
        if "repo.write" not in rights:
            raise HubProblem(
                f"your fine-grained token may not write to '{repo}'", hint=f"give it repo.write for '{owner}'"
            )


def _check_write(repo: str, who: Mapping[str, Any], run: Run) -> None:
    """Ask the Hub whether the token may write; where it cannot say, go by the owner's name."""
    from huggingface_hub import HfApi

    try:
        attempt(lambda: HfApi().auth_check(repo, write=True), run, f"repository '{repo}'")
    except Exception as error:
        status = status_of(error)
        if status == 404:
            _check_namespace(repo, who, "write")
            return
        if status in (401, 403):
            raise HubProblem(
                f"you have no write permission for '{repo}'",
                why=clean(str(error)),
                hint="name a repository of your own, or propose the result with --create-pr",
            ) from None
        problem = explain(error, "repository", repo)
        if problem is None:
            raise
        raise problem from None


def result_files(folder: Path) -> dict[str, Path]:
    """Files of a result by their path in the repository: no hidden ones (checkpoints, drafts), no links.

    Texts that were made to train on stay here: they quote the data, and their author may have terms.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = inside.parts[0] == "data" or any(part.startswith(".") for part in inside.parts)
        if path.is_file() and not path.is_symlink() and not hidden:
            found[inside.as_posix()] = path
    return found


@dataclass(slots=True)
class _State:
    """What the repository held when it was last looked at."""

    head: str
    files: Mapping[str, tuple[int | None, str | None]]
    requests: frozenset[int] | None


def publish(
    folder: Path, repo: str, run: Run, private: bool | None = None, create_pr: bool = False, message: str | None = None
) -> dict[str, str | None]:
    """Publish a result folder in one commit: either all files are there afterwards, or none.

    Weights of an earlier version that the new one does not replace are deleted in the same commit,
    since transformers would load them. After a fault the head is read again first: the answer to a
    commit may have been lost although the commit was made.

    Args:
        folder: A finished result.
        repo: Full id; made when it does not exist.
        run: Context.
        private: Visibility of a repository that is made.
        create_pr: Propose the commit as a pull request.
        message: First line of the commit's message.

    Returns:
        `url`, `commit`, and `pull_request` (its address, or None).

    Raises:
        HubProblem: not published; the folder is as it was, and the message says how to publish it.
    """
    try:
        return _publish(
            folder, repo, run, private, create_pr, message or f"Publish a result of kdtool {kdtool.__version__}"
        )
    except Exception as error:
        problem = error if isinstance(error, HubProblem) else _unpublished(error, repo)
        if problem is None:
            raise
        again = f"hf upload {repo} {folder} . --exclude '.kdtool/*'" + (" --private" if private else "")
        again += " --create-pr" if create_pr else ""
        first = "" if problem.hint in (None, CONNECTION_HINT) else f"{problem.hint}; "
        raise HubProblem(
            f"the result in {folder} is complete, but not published: {problem.message}",
            why=problem.why,
            hint=f"{first}publish it with: {again}",
        ) from None


def _unpublished(error: Exception, repo: str) -> HubProblem | None:
    status = status_of(error)
    if status == 412:
        return HubProblem(f"repository '{repo}' was changed meanwhile")
    if status == 403:
        return HubProblem(f"you have no write permission for '{repo}'", why=clean(str(error)))
    if status is None and isinstance(error, ValueError) and "huggingface_hub" in _origin(error):
        return HubProblem(f"the Hub refused the files for '{repo}'", why=clean(str(error)))  # such as the card
    return explain(error, "repository", repo)


def _origin(error: BaseException) -> set[str]:
    """Packages that an exception came through."""
    names, trace = set(), error.__traceback__
    while trace is not None:
        names.add(str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0])
        trace = trace.tb_next
    return names


def _publish(
    folder: Path, repo: str, run: Run, private: bool | None, create_pr: bool, message: str
) -> dict[str, str | None]:
    from huggingface_hub import HfApi

    api = HfApi()
    files = result_files(folder)
    if _existing(repo, run) is None:
        attempt(lambda: api.create_repo(repo, private=private, exist_ok=True), run, f"repository '{repo}'")
    state = _look(repo, run, create_pr)
    run.reporter.info(f"publishing {len(files)} files to {repo}")
    patience = Patience(run, f"repository '{repo}'")
    while True:
        try:
            info = api.create_commit(
                repo,
                _operations(files, state),
                commit_message=message,
                parent_commit=state.head,
                create_pr=create_pr,
            )
            return _published(api, repo, str(info.oid), info.pr_url)
        except Exception as error:
            if not patience.after(error):
                raise
            now = _look(repo, run, create_pr)
            if create_pr and (now.requests is None or state.requests is None):
                raise  # whether the request was opened cannot be known: a second one would be a duplicate
            opened = sorted((now.requests or frozenset()) - (state.requests or frozenset()))
            if create_pr and opened:
                return _proposed(api, repo, opened[-1], run)
            if not create_pr and now.head != state.head:
                if _holds(now, files):
                    return _published(api, repo, now.head, None)
                raise HubProblem(f"repository '{repo}' was changed meanwhile") from None
            state = now


def _look(repo: str, run: Run, create_pr: bool) -> _State:
    """Head, files and, for a pull request, the requests of a repository."""
    from huggingface_hub import HfApi

    info = attempt(lambda: HfApi().model_info(repo, files_metadata=True, timeout=_TIMEOUT), run, f"repository '{repo}'")
    files = {
        str(item.rfilename): (item.size, str(item.lfs.sha256) if item.lfs else item.blob_id)
        for item in info.siblings or ()
    }
    return _State(str(info.sha), files, _requests(repo, run) if create_pr else frozenset())


def _requests(repo: str, run: Run) -> frozenset[int] | None:
    """Numbers of this user's pull requests; None where the Hub does not say."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    def ask() -> frozenset[int]:
        api = HfApi()
        author = str(api.whoami(cache=True)["name"])
        found = api.get_repo_discussions(repo, author=author, discussion_type="pull_request")
        return frozenset(int(one.num) for one in found)

    try:
        return attempt(ask, run, f"repository '{repo}'")
    except HfHubHTTPError:
        return None


def _operations(files: Mapping[str, Path], state: _State) -> Sequence[Any]:
    """All files of the result, and the removal of weights that would be loaded in their place."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    old = [name for name in state.files if any(Path(name).match(pattern) for pattern in _STALE) and "/" not in name]
    deleted = [CommitOperationDelete(path_in_repo=name) for name in old if name not in files]
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items()]
    return [*deleted, *added]


def _holds(state: _State, files: Mapping[str, Path]) -> bool:
    """Whether the repository holds exactly these contents."""
    return all(name in state.files and state.files[name][1] in _hashes(path) for name, path in files.items())


def _hashes(path: Path) -> tuple[str, str]:
    """The names git and git-lfs give to a file's content."""
    git = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    lfs = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            git.update(block)
            lfs.update(block)
    return git.hexdigest(), lfs.hexdigest()


def _published(api: Any, repo: str, commit: str, pull_request: str | None) -> dict[str, str | None]:
    return {"url": f"{api.endpoint}/{repo}", "commit": commit, "pull_request": pull_request}


def _proposed(api: Any, repo: str, number: int, run: Run) -> dict[str, str | None]:
    """A pull request that was opened although its answer was lost."""
    info = attempt(
        lambda: api.model_info(repo, revision=f"refs/pr/{number}", timeout=_TIMEOUT), run, f"repository '{repo}'"
    )
    return _published(api, repo, str(info.sha), f"{api.endpoint}/{repo}/discussions/{number}")
