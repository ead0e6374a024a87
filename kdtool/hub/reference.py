"""Names of models on the Hub or on disk: what a reference means."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from kdtool.errors import UsageProblem

_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_PACKAGE = "package:"


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
        looks_like_path = text.startswith((".", "/", "~")) or name.count("/") > 1
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
