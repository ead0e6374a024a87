"""Data from the Hub, through the `datasets` library, pinned to a commit."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kdtool.data.layout import RawSplit, Source
from kdtool.errors import DataProblem, HubProblem, KdtoolError, UsageProblem
from kdtool.hub import cache
from kdtool.hub.problems import CONNECTION_HINT, clean, explain, gated
from kdtool.hub.retry import attempt, passes
from kdtool.run import Run

_REFERENCE = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(:(?P<config>[^@#]+))?(@(?P<revision>[^#]+))?(#(?P<split>.+))?"
)
_CONVERTED = "refs/convert/parquet"


@dataclass(frozen=True, slots=True)
class HubReference:
    """A data set on the Hub: `id[:config][@revision][#split]`."""

    id: str
    config: str | None = None
    revision: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubReference | None":
        """Read a reference; None when the text does not have that form."""
        match = _REFERENCE.fullmatch(text)
        return cls(match["id"], match["config"], match["revision"], match["split"]) if match else None


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Keep both Hub libraries off the network for a while."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if wanted:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def open_hub(reference: HubReference, name: str, run: Run, hint: str | None = None) -> Source:
    """Load a data set of the Hub (from the cache where it is there).

    Args:
        reference: What to load.
        name: As the user wrote it.
        run: Gives the cache folder and whether the network may be used.
        hint: Said with the error when there is no such data set.

    Raises:
        UsageProblem: the `datasets` library is not installed.
        HubProblem: network, permission, or no such data set.
        DataProblem: no such configuration or split, or files that cannot be read.
    """
    try:
        import datasets
    except ImportError:
        raise UsageProblem(
            f"data '{name}' is on the Hub, which needs the datasets library", hint="pip install 'kdtool[data]'"
        ) from None
    loaded, commit = _obtain(datasets, reference, run, hint)
    splits = {reference.split or "train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    readers = {split: partial(_read, rows) for split, rows in splits.items()}
    return Source(name, "hub", readers, None, None, commit or _cached_commit(splits))


def _obtain(datasets: Any, reference: HubReference, run: Run, hint: str | None) -> tuple[Any, str | None]:
    """The data and its commit: from the cache where that commit is there, else from the Hub."""
    what = f"data set '{reference.id}'"
    offline = run.offline or datasets.config.HF_HUB_OFFLINE
    folder = cache.storage("dataset", reference.id, run.cache_dir)
    known = run.provenance.setdefault("revisions", {})
    key = f"datasets/{reference.id}@{reference.revision or 'main'}"
    commit = known.get(key) or (reference.revision if cache.is_commit(reference.revision) else None)
    if offline and commit is None:
        commit = cache.recall(folder, reference.revision)
    try:
        if commit is None and not offline:
            try:
                commit = attempt(lambda: _commit(reference), run, what)
                cache.remember(folder, reference.revision, str(commit))
            except Exception as error:
                commit = cache.recall(folder, reference.revision)
                problem = explain(error, "data set", reference.id, reference.revision)
                if problem is None or commit is None or not passes(error):
                    raise
                run.reporter.warn(f"{problem.message}; using the copy in the cache, commit {commit[:12]}")
                offline = True
        with _offline(offline):
            loaded = _from_cache(datasets, reference, str(commit), run) if commit else None
            if loaded is None and offline and reference.revision is not None:
                raise _not_cached(reference, hint)
            if loaded is None:
                loaded = attempt(lambda: _load(datasets, reference, commit, run), run, what)
    except KdtoolError:
        raise
    except Exception as error:  # noqa: BLE001 - what the libraries raise is sorted below, the rest goes on
        raise _explain(error, reference, hint, offline) or error from None
    if commit is not None:
        known[key] = commit
    return loaded, commit


def _from_cache(datasets: Any, reference: HubReference, commit: str, run: Run) -> Any:
    """The data of exactly this commit as the library prepared it before; None when it did not.

    The library's own way back to its cache takes whatever was used last, of any commit.
    """
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    *namespace, name = reference.id.split("/")
    base = run.cache_dir or str(datasets.config.HF_DATASETS_CACHE)
    root = Path(base).expanduser() / "___".join([*namespace, camelcase_to_snakecase(name)])
    prepared = [path.parent for path in root.glob(f"*/*/{commit}/dataset_info.json")]
    wanted = reference.config
    if wanted and (reference.revision or "").startswith(_CONVERTED):
        wanted = f"default-data_dir={wanted}"
    fitting = [path for path in prepared if wanted in (None, path.parent.parent.name)]
    if len(fitting) != 1:
        return None  # none, or the library must say which configurations there are
    version, config = fitting[0].parent.name, fitting[0].parent.parent.name
    builder = Cache(
        cache_dir=base, dataset_name=name, repo_id=reference.id, config_name=config, version=version, hash=commit
    )
    return builder.as_dataset(split=reference.split)


def _commit(reference: HubReference) -> str | None:
    from huggingface_hub import HfApi

    return HfApi().dataset_info(reference.id, revision=reference.revision).sha  # type: ignore[no-any-return]


def _load(datasets: Any, reference: HubReference, commit: str | None, run: Run) -> Any:
    choice: dict[str, Any] = {"name": reference.config}
    if reference.config and (reference.revision or "").startswith(_CONVERTED):
        choice = {"data_dir": reference.config}  # the converted branch keeps configurations as folders
    return datasets.load_dataset(
        reference.id, split=reference.split, revision=commit, cache_dir=run.cache_dir, **choice
    )


def _cached_commit(splits: dict[str, Any]) -> str | None:
    """The commit that cached data came from, as its download records say."""
    for rows in splits.values():
        for url in rows.info.download_checksums or {}:
            match = re.search(r"@([0-9a-f]{40})/", url)
            if match:
                return match[1]
    return None


def _read(rows: Any) -> RawSplit:
    import datasets

    names = {
        column: list(feature.names)
        for column, feature in rows.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    table = rows.with_format("arrow")[:]
    return RawSplit(table, names, {"fingerprint": rows._fingerprint})


def _not_cached(reference: HubReference, hint: str | None) -> HubProblem:
    wanted = f"data set '{reference.id}'" + (f" at '{reference.revision}'" if reference.revision else "")
    return HubProblem(
        f"{wanted} is not in the cache, and offline is set",
        hint=hint or "load it once with the network, or give a folder or file",
    )


def _explain(error: Exception, reference: HubReference, hint: str | None, offline: bool) -> KdtoolError | None:
    """The error in our words; None for what should not be hidden."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    why = clean(str(error))
    if "scripts are no longer supported" in why:
        return DataProblem(
            f"data set '{reference.id}' is made by a script, which is not run",
            hint=f"try its converted copy: {reference.id}@{_CONVERTED}",
        )
    if isinstance(error, ValueError) and ("Config" in why or "config" in why):
        return DataProblem(f"data set '{reference.id}' needs another configuration", why=why, hint="write ID:CONFIG")
    if isinstance(error, ValueError) and "split" in why:
        return DataProblem(f"data set '{reference.id}' has no split '{reference.split}'", why=why)
    if offline and isinstance(error, OSError | DatasetsError | ValueError):
        return _not_cached(reference, hint)
    problem = explain(error, "data set", reference.id, reference.revision)
    if problem is not None:
        problem.hint = hint if hint and "does not exist" in problem.message else problem.hint
        return problem
    if isinstance(error, DatasetNotFoundError) and "is a gated dataset" in why:  # the library drops the cause
        return gated("data set", reference.id)
    if isinstance(error, DatasetNotFoundError) and why.startswith("Revision "):
        return HubProblem(
            f"data set '{reference.id}' has no revision '{reference.revision}'", hint="name a branch, tag or commit"
        )
    if isinstance(error, DatasetNotFoundError):
        return HubProblem(
            f"data set '{reference.id}' does not exist on the Hub, or is private, or you are not logged in",
            hint=hint or "check the id; for private data set HF_TOKEN or run: hf auth login",
        )
    if isinstance(error, ConnectionError | TimeoutError):
        return HubProblem(f"data set '{reference.id}' cannot be fetched", why=why, hint=CONNECTION_HINT)
    if isinstance(error, OSError) and error.errno is not None:
        return None  # the disk, not the Hub
    if isinstance(error, DatasetsError | ValueError | OSError):
        return DataProblem(f"data set '{reference.id}' cannot be read", why=why)
    return None
