"""Names of things on the Hub or on disk: what a reference means, which revision it is, its files."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from kdtool.errors import HubProblem, UsageProblem
from kdtool.run import Run

_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_PACKAGE = "package:"
# what a model needs at run time; everything else in a repository stays where it is
_MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "1_Pooling/*"]


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model in a folder, in an installed package, or on the Hub at an optional revision.

    Attributes:
        name: Folder as given, or Hub id.
        revision: Branch, tag or commit; None for the default branch (always None for folders).
        folder: The folder, when the reference is one.
    """

    name: str
    revision: str | None = None
    folder: Path | None = None

    @classmethod
    def parse(cls, text: str, what: str = "model") -> "ModelRef":
        """Read a folder, `package:NAME/folder`, or `id[@revision]`; what exists on disk is a folder.

        Raises:
            UsageProblem: none of these.
        """
        if text.startswith(_PACKAGE):
            return cls(text, None, _package_folder(text, what))
        path = Path(text).expanduser()
        if path.is_dir():
            return cls(text, None, path)
        if path.is_file():
            raise UsageProblem(
                f"{what} '{text}' is a file, not a model folder", hint="give the folder that holds config.json"
            )
        name, _, revision = text.partition("@")
        looks_like_path = text.startswith((".", "/", "~")) or text.count("/") > 1
        if looks_like_path or not _ID.match(name):
            raise UsageProblem(
                f"{what} folder '{text}' does not exist", hint="give a folder, or a Hub id such as owner/name@revision"
            )
        return cls(name, revision or None)

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def _package_folder(text: str, what: str) -> Path:
    """Folder inside an installed package, found without importing it."""
    package, _, inside = text.removeprefix(_PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UsageProblem(
            f"{what} '{text}' needs the package {package}, which is not installed", hint="pip install 'kdtool[demo]'"
        )
    root = Path(spec.submodule_search_locations[0]).resolve()
    folder = (root / inside).resolve()
    if not folder.is_relative_to(root) or not folder.is_dir():
        raise UsageProblem(f"package {package} has no folder '{inside}'")
    return folder


def fetch_model(ref: ModelRef, run: Run) -> tuple[Path, str]:
    """Download a Hub model at one pinned commit.

    Returns:
        Local snapshot folder and the commit (40 hex digits).

    Raises:
        HubProblem: not found, gated, offline and not cached, or the network failed.
    """
    return _fetch(ref, run, [*_MODEL_FILES, "*.bin"] if run.allow_pickle else _MODEL_FILES)


def fetch_config(ref: ModelRef, run: Run) -> tuple[Path, str]:
    """Download only a Hub model's config.json; as `fetch_model`."""
    return _fetch(ref, run, ["config.json"])


def _fetch(ref: ModelRef, run: Run, patterns: list[str]) -> tuple[Path, str]:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        if run.offline:
            folder = Path(
                snapshot_download(
                    ref.name,
                    revision=ref.revision,
                    cache_dir=run.cache_dir,
                    local_files_only=True,
                    allow_patterns=patterns,
                )
            )
            return folder, folder.name
        revision = str(HfApi().model_info(ref.name, revision=ref.revision).sha)
        folder = Path(snapshot_download(ref.name, revision=revision, cache_dir=run.cache_dir, allow_patterns=patterns))
        return folder, revision
    except GatedRepoError:
        raise HubProblem(
            f"'{ref.name}' is gated", hint="ask for access on its page, then log in or pass --token"
        ) from None
    except RevisionNotFoundError:
        raise HubProblem(
            f"'{ref.name}' has no revision '{ref.revision}'", hint="name a branch, tag or commit of that repository"
        ) from None
    except RepositoryNotFoundError:
        raise HubProblem(
            f"'{ref.name}' is missing, private, or you are not logged in",
            hint="check the id; for private models pass --token",
        ) from None
    except LocalEntryNotFoundError as error:
        why = "offline, and nothing cached" if run.offline else str(error).split("\n", 1)[0]
        raise HubProblem(f"'{ref}' cannot be had", why=why, hint="run once with a network, or give a folder") from None
    except HfHubHTTPError as error:
        raise HubProblem(f"the Hub refused '{ref.name}'", why=str(error).split("\n", 1)[0]) from None
