"""Data from the Hub, through the `datasets` library, pinned to a commit."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from kdtool.data.layout import RawSplit, Source
from kdtool.errors import DataProblem, HubProblem, KdtoolError, UsageProblem
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
    try:
        with _offline(run.offline):
            commit = reference.revision if datasets.config.HF_HUB_OFFLINE else _commit(reference)
            loaded = _load(datasets, reference, commit, run)
    except KdtoolError:
        raise
    except Exception as error:  # noqa: BLE001 - what the libraries raise is sorted below, the rest goes on
        raise _explain(error, reference, hint, run.offline) or error from None
    splits = {reference.split or "train": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    readers = {split: partial(_read, rows) for split, rows in splits.items()}
    return Source(name, "hub", readers, None, None, commit or _cached_commit(splits))


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


def _explain(error: Exception, reference: HubReference, hint: str | None, offline: bool) -> KdtoolError | None:
    """The error in our words; None for what should not be hidden."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    why = " ".join(str(error).split())[:300]
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
        return HubProblem(
            f"data set '{reference.id}' is not in the cache, and offline is set",
            hint=hint or "load it once with the network, or give a folder or file",
        )
    if isinstance(error, RevisionNotFoundError):
        return HubProblem(
            f"data set '{reference.id}' has no revision '{reference.revision}'", hint="name a branch, tag or commit"
        )
    if isinstance(error, DatasetNotFoundError | RepositoryNotFoundError):
        return HubProblem(
            f"data set '{reference.id}' does not exist on the Hub, or is private",
            hint=hint or "check the id; for private data set HF_TOKEN or run: hf auth login",
        )
    if isinstance(error, HfHubHTTPError | OSError):
        return HubProblem(
            f"data set '{reference.id}' cannot be fetched", why=why, hint="check the network, or use --offline"
        )
    if isinstance(error, DatasetsError | ValueError):
        return DataProblem(f"data set '{reference.id}' cannot be read", why=why)
    return None
