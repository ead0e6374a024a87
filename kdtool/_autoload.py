"""Let transformers' Auto classes know kdtool's architectures, without importing anything early.

`import kdtool` must stay light, and `AutoModel....from_pretrained(folder)` must then load what kdtool
wrote. So the table in which the Auto classes look up a configuration's `model_type` gets an extra
part that imports `kdtool.modeling` the first time that a name of kdtool's is looked up in it.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_TABLE = "transformers.models.auto.configuration_auto"
_PREFIX = "kdtool-"
"""What the `model_type` of each of kdtool's architectures starts with."""


class _Registered(dict[str, Any]):
    """Configurations registered by name; looking for one of kdtool's makes them all known."""

    def __contains__(self, name: object) -> bool:
        if not super().__contains__(name) and isinstance(name, str) and name.startswith(_PREFIX):
            importlib.import_module("kdtool.modeling")  # registers itself in here
        return super().__contains__(name)


def _extend(table: ModuleType) -> None:
    mapping = table.CONFIG_MAPPING
    if not isinstance(mapping._extra_content, _Registered):
        mapping._extra_content = _Registered(mapping._extra_content)


class _Watch(MetaPathFinder):
    """Extends the table right after its module was first imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The ordinary specification, with a loader that extends the table."""
        if fullname != _TABLE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_extend(module: ModuleType) -> None:
                run(module)
                _extend(module)

            spec.loader.exec_module = run_and_extend  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Extend the table now, if transformers has it already, or as soon as it is imported."""
    table = sys.modules.get(_TABLE)
    if table is not None:
        _extend(table)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
