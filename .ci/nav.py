"""Lets an entry of the navigation name a folder (`methods/*`), so that a new page appears without being listed."""

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Replace `FOLDER/*` by the pages of that folder, its index first."""
    config["nav"] = [_expanded(entry, Path(config["docs_dir"])) for entry in config["nav"]]
    return config


def _expanded(entry: Any, docs: Path) -> Any:
    if isinstance(entry, dict):
        return {
            title: _pages(docs, target[:-2]) if isinstance(target, str) and target.endswith("/*") else target
            for title, target in entry.items()
        }
    return entry


def _pages(docs: Path, folder: str) -> list[dict[str, str]]:
    names = sorted((page.stem for page in (docs / folder).glob("*.md")), key=lambda name: (name != "index", name))
    return [{"Overview" if name == "index" else name: f"{folder}/{name}.md"} for name in names]
