"""What the Hub and the network raise, said in our words and without secrets."""

import os

from kdtool.errors import HubProblem

CONNECTION_HINT = "check the connection and HF_ENDPOINT, then run again: complete files are kept in the cache"
_LOGIN_HINT = "set HF_TOKEN, pass --token, or run: hf auth login"
_MARK = "[redacted]"


def clean(text: str, limit: int = 300) -> str:
    """One line of a message, without the token in use.

    Args:
        text: What a library or a server said.
        limit: Longest result in characters.
    """
    from huggingface_hub import get_token

    secrets = {os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "KDTOOL_TOKEN")} | {get_token()}
    for secret in secrets:
        if secret and len(secret) >= 4:
            text = text.replace(secret, _MARK)
    return " ".join(text.split())[:limit]


def is_transport(error: BaseException) -> bool:
    """Whether the connection itself failed: refused, cut, timed out.

    The client lets its HTTP library's exceptions through, which derive from nothing of its own; that
    library is httpx or httpx2, depending on the client's version.
    """
    return any(
        base.__module__.partition(".")[0] in ("httpx", "httpx2") and base.__name__ == "TransportError"
        for base in type(error).__mro__
    )


def is_refused(error: BaseException) -> bool:
    """Whether nobody answered at all."""
    return is_transport(error) and type(error).__name__ in ("ConnectError", "ConnectTimeout")


def status_of(error: BaseException) -> int | None:
    """HTTP status of an answer that the client raised; None for anything else."""
    from huggingface_hub.errors import HfHubHTTPError

    response = getattr(error, "response", None)
    return int(response.status_code) if isinstance(error, HfHubHTTPError) and response is not None else None


def chain(error: BaseException) -> list[BaseException]:
    """An exception and what caused it, outermost first."""
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    return links


def explain(error: BaseException, what: str, name: str, revision: str | None = None) -> HubProblem | None:
    """Say what an exception of the client means; None for what is none of the Hub's.

    Args:
        error: The exception; its causes are looked at too.
        what: Kind of repository as people say it: `model`, `student`, `data set`.
        name: Id of the repository.
        revision: The revision that was asked for.
    """
    links = chain(error)
    return next((p for link in links if (p := _refusal(link, what, name, revision))), None) or next(
        (p for link in links if (p := _trouble(link, what, name))), None
    )


def gated(what: str, name: str) -> HubProblem:
    """Access must be asked for first."""
    return HubProblem(
        f"{what} '{name}' is gated, and access is not granted",
        hint=f"accept the terms on its page, then {_LOGIN_HINT}",
    )


def _refusal(error: BaseException, what: str, name: str, revision: str | None) -> HubProblem | None:
    """The Hub answered, and said no."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return gated(what, name)
    if isinstance(error, errors.DisabledRepoError):
        return HubProblem(f"{what} '{name}' has been disabled on the Hub", hint="choose another, or ask its owner")
    if isinstance(error, errors.RevisionNotFoundError):
        return HubProblem(
            f"{what} '{name}' has no revision '{revision or 'main'}'",
            hint="name a branch, tag or commit of that repository",
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return HubProblem(f"{what} '{name}' lacks a file", why=_said(error), hint="check the name and the revision")
    status = status_of(error)
    if status == 401 and "nvalid" in _said(error):
        return HubProblem("the Hub does not accept this token", why=_said(error), hint=f"make a new one: {_LOGIN_HINT}")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return HubProblem(
            f"{what} '{name}' does not exist on the Hub, or is private, or you are not logged in",
            hint=f"check the id; if it is private, {_LOGIN_HINT}",
        )
    if status == 403:
        return HubProblem(f"your token may not use {what} '{name}'", why=_said(error), hint="give it that permission")
    return None


def _trouble(error: BaseException, what: str, name: str) -> HubProblem | None:
    """The Hub did not answer, or not now."""
    from huggingface_hub import errors

    status = status_of(error)
    if status == 429:
        return HubProblem(
            f"the Hub limits how often it may be asked, at {what} '{name}'",
            why=_said(error),
            hint="wait some minutes and run again; logged-in users have higher limits",
        )
    if status is not None and status >= 500:
        return HubProblem(f"the Hub failed with status {status} at {what} '{name}'", why=_said(error), hint=_later())
    if status is not None:
        return HubProblem(f"the Hub refused {what} '{name}'", why=f"status {status}: {_said(error)}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubProblem(
            f"{what} '{name}' is not in the cache, and offline is set", hint="run once with a network, or give a folder"
        )
    if is_refused(error):
        why = clean(str(error)) if "/" in name else f"there is no such folder here, and {clean(str(error))}"
        return HubProblem(f"the Hub cannot be reached for {what} '{name}'", why=why, hint=CONNECTION_HINT)
    if is_transport(error):
        return HubProblem(
            f"the connection to the Hub broke at {what} '{name}'",
            why=clean(str(error)) or type(error).__name__,
            hint=CONNECTION_HINT,
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.FileMetadataError):
        return HubProblem(f"{what} '{name}' cannot be had", why=clean(str(error)), hint=CONNECTION_HINT)
    return None


def _later() -> str:
    return "run again later: complete files are kept in the cache"


def _said(error: BaseException) -> str:
    """What the server gave as the reason, in one line."""
    message = getattr(error, "server_message", None) or str(error)
    return clean(str(message))
