"""Models from the Hub, each resolved once to a commit and fetched file by file at that commit."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kdtool.errors import HubProblem, ModelProblem
from kdtool.hub import cache
from kdtool.hub.problems import CONNECTION_HINT, explain
from kdtool.hub.reference import ModelRef
from kdtool.hub.retry import attempt, passes
from kdtool.run import Run

# what a model needs at run time; everything else in a repository stays where it is
_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py")
_NESTED = re.compile(r"\d+_\w+/config\.json|additional_chat_templates/[\w.-]+\.jinja")
_PICKLES = (".bin", ".pt", ".pth")
_THREADS = 4
_TIMEOUT = 30.0


def fetch_model(ref: ModelRef, run: Run) -> tuple[Path, str]:
    """Download a Hub model at one pinned commit; what is in the cache is not asked for again.

    The commit of a branch is looked up once in a run and kept in `run.provenance["revisions"]`, so
    that all parts of the run use the same one. A model that is cached and asked for by commit, or
    offline, is used without any request.

    Returns:
        Local snapshot folder and the commit (40 hex digits).

    Raises:
        HubProblem: not found, gated, offline and not cached, or the network failed.
        ModelProblem: the repository holds only pickle weights, and these are not allowed.
    """
    return _fetch(ref, run, weights=True)


def fetch_config(ref: ModelRef, run: Run) -> tuple[Path, str]:
    """Download only a Hub model's config.json; as `fetch_model`."""
    return _fetch(ref, run, weights=False)


def _fetch(ref: ModelRef, run: Run, weights: bool) -> tuple[Path, str]:
    from huggingface_hub import is_offline_mode

    folder = cache.storage("model", ref.name, run.cache_dir)
    known = run.provenance.get("revisions", {}).get(str(ref))
    commit = known or (ref.revision if cache.is_commit(ref.revision) else None)
    offline = run.offline or is_offline_mode()
    if offline and commit is None:
        commit = cache.recall(folder, ref.revision)
    found = cache.snapshot(folder, commit, weights, run.allow_pickle) if commit else None
    if found is not None and commit is not None:
        return found, _pin(run, ref, commit)
    if offline:
        raise HubProblem(
            f"model '{ref}' cannot be had",
            why=_why_not(folder, commit),
            hint="run once with a network, or give a folder",
        )
    try:
        info = attempt(lambda: _info(ref.name, commit or ref.revision), run, f"model '{ref}'")
    except Exception as error:  # noqa: BLE001 - what the client raises has no common base; the rest is raised again
        return _without_hub(error, ref, run, weights)
    commit = str(info.sha)
    _announce_rename(str(info.id), ref, run)
    _pin(run, ref, commit)
    names = [str(sibling.rfilename) for sibling in info.siblings or ()]
    wanted = _wanted(names, ref, run) if weights else [name for name in names if name == "config.json"]
    _download(ref, commit, wanted, folder, run)
    cache.remember(folder, ref.revision, commit)
    return folder / "snapshots" / commit, commit


def _info(name: str, revision: str | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi().model_info(name, revision=revision, timeout=_TIMEOUT)


def _pin(run: Run, ref: ModelRef, commit: str) -> str:
    run.provenance.setdefault("revisions", {})[str(ref)] = commit
    return commit


def _announce_rename(name: str, ref: ModelRef, run: Run) -> None:
    if name.lower() != ref.name.lower() and ref.name not in run.provenance.setdefault("renamed", {}):
        run.provenance["renamed"][ref.name] = name
        run.reporter.warn(f"model '{ref.name}' is now called '{name}' on the Hub")


def _why_not(folder: Path, commit: str | None) -> str:
    if commit is not None and (folder / "snapshots" / commit).is_dir():
        return "offline, and only part of it is in the cache"
    return "offline, and nothing cached"


def _without_hub(error: Exception, ref: ModelRef, run: Run, weights: bool) -> tuple[Path, str]:
    """Use the cached copy when the Hub has a fault, and say so; a refusal is a refusal."""
    problem = explain(error, "model", ref.name, ref.revision)
    if problem is None:
        raise error
    folder = cache.storage("model", ref.name, run.cache_dir)
    commit = cache.recall(folder, ref.revision)
    found = cache.snapshot(folder, commit, weights, run.allow_pickle) if commit else None
    if not passes(error) or commit is None or found is None:
        raise problem from None
    run.reporter.warn(f"{problem.message}; using the copy in the cache, commit {commit[:12]}")
    return found, _pin(run, ref, commit)


def _wanted(names: Sequence[str], ref: ModelRef, run: Run) -> list[str]:
    """Files of a repository that a model needs.

    Raises:
        ModelProblem: only pickle weights, and these are not allowed.
    """
    patterns = (*_MODEL_FILES, "*.bin") if run.allow_pickle else _MODEL_FILES
    root = [name for name in names if "/" not in name]
    wanted = [name for name in root if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not run.allow_pickle and not any(name.endswith(".safetensors") for name in wanted):
        pickles = [name for name in root if name.endswith(_PICKLES)]
        if pickles:
            raise ModelProblem(
                f"'{ref}' has only pickle weights, which can run code when loaded",
                why=", ".join(pickles[:3]),
                hint="convert it to safetensors, or trust it with --allow-pickle (loaded weights-only)",
            )
    # small files first: what is wrong with a model shows before its weights arrive
    return sorted(wanted, key=lambda name: (name.endswith((".safetensors", ".bin")), name)) + [
        name for name in names if _NESTED.fullmatch(name)
    ]


def _download(ref: ModelRef, commit: str, names: Sequence[str], folder: Path, run: Run) -> None:
    """Fetch files at a commit; those in the cache are not asked for.

    Raises:
        HubProblem: one of them could not be had; it says what is kept.
    """
    cache.drop_stale(folder)
    found = folder / "snapshots" / commit
    missing = [name for name in names if not (found / name).is_file()]
    mark = cache.Unfinished(folder, commit)
    if len(names) > 1 and missing:  # config.json alone is no start of a snapshot
        mark.put()
    done = 0
    pool = ThreadPoolExecutor(_THREADS)
    try:
        waiting = [pool.submit(_one, ref, commit, name, run) for name in missing]
        for future in waiting:
            future.result()
            done += 1
            run.reporter.progress(f"downloading {ref.name}", done, len(missing), {})
    except Exception as error:  # what the client raises derives from nothing in common
        pool.shutdown(cancel_futures=True)
        problem = explain(error, "model", ref.name, ref.revision)
        if problem is None:
            raise
        if passes(error) or problem.hint == CONNECTION_HINT:
            kept = sum((found / name).is_file() for name in names)
            problem.hint = f"run again: {kept} of {len(names)} files are in the cache and stay there"
        raise problem from None
    finally:
        pool.shutdown(cancel_futures=True)
    if len(names) > 1:
        mark.take_away()


def _one(ref: ModelRef, commit: str, name: str, run: Run) -> None:
    """One file; a connection cut in the middle goes on where it stopped, inside the client."""
    from huggingface_hub import hf_hub_download

    attempt(
        lambda: hf_hub_download(ref.name, name, revision=commit, cache_dir=run.cache_dir), run, f"'{ref.name}/{name}'"
    )
