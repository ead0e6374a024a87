"""Turns every exception into a `KdtoolError`: one line what, one line why, one line what to do."""

import errno
import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

import typer

from kdtool.cli.session import Session
from kdtool.errors import HubProblem, Interrupted, KdtoolError, MemoryProblem, OutputProblem, UsageProblem, nearest
from kdtool.writing import redact

_HUB_PACKAGES = {"huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}

_HUB_HINTS = {
    "GatedRepoError": "accept the terms on the repository's page, then give --token or set HF_TOKEN",
    "RepositoryNotFoundError": "check the name; a private repository needs --token or HF_TOKEN",
    "RevisionNotFoundError": "check what follows the @, or leave it out",
    "EntryNotFoundError": "check the name of the repository and of the file",
    "RemoteEntryNotFoundError": "check the name of the repository and of the file",
    "LocalEntryNotFoundError": "run once without --offline, or check the connection and --cache-dir",
    "OfflineModeIsEnabled": "run once without --offline, or use a local folder",
    "HFValidationError": "give a folder, or a Hub id such as owner/name@revision",
}
_NETWORK_HINT = "check the connection and HF_ENDPOINT, then run again: downloads go on where they stopped"

_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|cannot allocate memory", re.IGNORECASE
)
_TOO_LARGE = re.compile(r"os error 27\b")
_NO_SPACE = re.compile(r"No space left on device|os error 28|Disk quota exceeded")


class Unexpected(KdtoolError):
    """An exception that nobody foresaw (exit 1)."""

    code = "unexpected"


def explain(error: BaseException, session: Session) -> KdtoolError:
    """Find the expected failure that an exception stands for; secrets are taken out of its lines."""
    found = _classify(error, session)
    found.message = without_secrets(found.message)
    found.why = without_secrets(found.why) if found.why else None
    found.hint = without_secrets(found.hint) if found.hint else None
    return found


def without_secrets(text: str) -> str:
    """Replace the tokens in use, and what looks like one, by a mark."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "KDTOOL_TOKEN", "KDTOOL_ENDPOINT_KEY", "OPENAI_API_KEY"):
        value = os.environ.get(name, "")
        if len(value) >= 4:
            text = text.replace(value, "[redacted]")
    return redact(text)


def _classify(error: BaseException, session: Session) -> KdtoolError:
    if isinstance(error, KdtoolError):
        return error
    if isinstance(error, typer.TyperException):
        return explain_usage(error, session)
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return Interrupted("interrupted", hint=_resume_hint(session))
    chain = list(_chain(error))
    for link in chain:
        if _is_out_of_memory(link):
            return MemoryProblem("out of memory", why=_first_line(link), hint=_memory_hint(session))
    for link in chain:
        if type(link).__module__.partition(".")[0] in _HUB_PACKAGES:
            hint = next((_HUB_HINTS[base.__name__] for base in type(link).__mro__ if base.__name__ in _HUB_HINTS), None)
            return HubProblem("the Hub could not be used", why=_first_line(link), hint=hint or _NETWORK_HINT)
    for link in chain:
        found = _explain_system(link)
        if found is not None:
            return found
    return Unexpected(
        f"unexpected {type(error).__name__}: {_first_line(error)}",
        hint="set KDTOOL_DEBUG=1 for the traceback; please report it with the output of: kdtool env",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, its cause, the cause of that, and so on."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:300] if lines else type(error).__name__


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    in_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return in_system or (isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error))))


def _memory_hint(session: Session) -> str:
    """Name three settings that help, with values for the run at hand."""
    config = session.config
    if config is None or config.command != "distill":
        smaller = max(1, config.eval.batch_size // 4) if config else 16
        return f"try --set eval.batch_size={smaller}, --set data.max_length=128, or --dtype bfloat16"
    batch, steps = config.train.batch_size, config.train.grad_accum
    split = 4 if batch % 4 == 0 else 2 if batch % 2 == 0 else 1
    less = f"--batch-size {batch // split} --grad-accum {steps * split}" if split > 1 else "--batch-size 1"
    length = max(1, (config.data.max_length or 256) // 2)
    return f"try {less} (same result), --set data.max_length={length}, or --dtype bfloat16"


def _resume_hint(session: Session) -> str | None:
    from kdtool.cli.checks import MARKER

    folder = session.config.output.folder if session.config else None
    if folder and (Path(folder) / MARKER).is_file():
        return "run the same command again to go on from the last checkpoint"
    return None


def _explain_system(error: BaseException) -> KdtoolError | None:
    if isinstance(error, (ConnectionError, TimeoutError)) and not isinstance(error, BrokenPipeError):
        return HubProblem("the network could not be used", why=_first_line(error), hint=_NETWORK_HINT)
    number = error.errno if isinstance(error, OSError) else None
    where = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
    if number in (errno.ENOSPC, errno.EDQUOT) or _NO_SPACE.search(str(error)):
        return OutputProblem(
            f"no space left on the device{where}", hint="free some space, or give another -o or --cache-dir"
        )
    if number == errno.EFBIG or _TOO_LARGE.search(str(error)):
        return OutputProblem(
            f"a file may not become as large as it has to{where}",
            hint="raise the limit (ulimit -f), or give another -o",
        )
    if number in (errno.EACCES, errno.EPERM):
        return OutputProblem(f"permission denied{where}", hint="give a folder you may write to with -o or --cache-dir")
    if number == errno.EROFS:
        return OutputProblem(
            f"read-only file system{where}", hint="give a folder you may write to with -o or --cache-dir"
        )
    if number in (errno.ENAMETOOLONG, errno.EMFILE):
        return OutputProblem(f"{os.strerror(number).lower()}{where}")
    return None


def explain_usage(error: typer.TyperException, session: Session) -> UsageProblem:
    """Say what is wrong with the command line and name the nearest valid option or command."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else _typed_path(session)
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and option:
        return UsageProblem(f"unknown option '{option}'", hint=_option_hint(str(option), context, path, session))
    missing = re.match(r"No such command '(.*?)'", error.message)
    if missing and context is not None:
        known = nearest(missing[1], context.command.commands)
        return UsageProblem(f"unknown command '{missing[1]}'", hint=f"{known} See: {path} --help")
    message = error.format_message().rstrip(".").replace("Input should be", "should be")
    return UsageProblem(message[:1].lower() + message[1:], hint=f"see: {path} --help")


def _typed_path(session: Session) -> str:
    """The command that was typed, where the parser does not say."""
    first = session.argv[0] if session.argv else "-"
    return "kdtool" if first.startswith("-") else f"kdtool {first}"


def _option_hint(option: str, context: object, path: str, session: Session) -> str:
    """A very near option, else the configuration key or method setting of that name, else near options."""
    params = getattr(getattr(context, "command", None), "params", [])
    flags = [flag for param in params for flag in (*param.opts, *param.secondary_opts) if flag.startswith("--")]
    near = get_close_matches(option.replace("_", "-"), flags, n=2, cutoff=0.8)
    if not near:
        key = _key_for(option.lstrip("-").replace("-", "_"), session)
        if key:
            return f"give it as --set {key}=... See: {path} --help"
        near = get_close_matches(option.replace("_", "-"), flags, n=3, cutoff=0.6)
    return f"did you mean {', '.join(near)}? See: {path} --help" if near else f"see: {path} --help"


def _key_for(name: str, session: Session) -> str | None:
    """Key path of a setting by its last word; of the method named on the command line, else of any."""
    from kdtool.config import key_paths
    from kdtool.registry import METHODS

    for path in key_paths():
        if path.rpartition(".")[2] == name:
            return path
    named = [method for method in METHODS.names() if method in session.argv] or METHODS.names()
    known = {setting.name for method in named for setting in METHODS.info(method).settings}
    return f"method.{name}" if name in known else None
