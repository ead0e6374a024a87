"""Names of things on the Hub or on disk: what a reference means, and which revision it is."""

import re
from dataclasses import dataclass
from pathlib import Path

from kdtool.errors import UsageProblem

_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model in a folder, or on the Hub at an optional revision.

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
        """Read `folder` or `id[@revision]`; anything that exists on disk is a folder.

        Raises:
            UsageProblem: neither a folder nor a well-formed id.
        """
        path = Path(text).expanduser()
        if path.is_dir():
            return cls(text, None, path)
        if path.is_file():
            raise UsageProblem(f"{what} '{text}' is a file, not a model folder", hint="give the folder that holds config.json")
        name, _, revision = text.partition("@")
        looks_like_path = text.startswith((".", "/", "~")) or text.count("/") > 1
        if looks_like_path or not _ID.match(name):
            raise UsageProblem(f"{what} folder '{text}' does not exist", hint="give a folder, or a Hub id such as owner/name@revision")
        return cls(name, revision or None)

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name
