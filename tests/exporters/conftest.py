"""Exports shared by the tests: a process pays some ten seconds for its first."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from kdtool.config import load_config
from kdtool.exporters import _adapter
from kdtool.models import Loaded
from kdtool.pipelines import export
from kdtool.proof import Result
from kdtool.run import Run
from kdtool.sections import RunConfig
from kdtool.tasks._base import Batch

Export = Callable[..., Result]


def config_of(
    model: Path | str, folder: Path, *overrides: str, fmt: str = "onnx", data: Path | None = None
) -> RunConfig:
    options = {"teacher.model": str(model), "output.folder": str(folder), "output.format": fmt}
    if data is not None:
        options["data.source"] = str(data)
    return load_config("export", None, overrides, options)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, models: Callable[[str], Path]) -> Export:
    """`exported(NAME, *overrides)`: the result of an ONNX export of a tiny model, made once.

    Number formats are made from the graph in float32, which is traced once for all of them.
    """
    root = tmp_path_factory.mktemp("exports")
    traced: dict[tuple[str, str], Path] = {}

    @cache
    def make(name: str, *overrides: str) -> Result:
        trace = _adapter.write_onnx

        def once(
            loaded: Loaded, batch: Batch, path: Path, opset: int, engine: str, run: Run, fixed: bool = False
        ) -> str:
            kept = traced.setdefault((name, engine), root / f"traced-{name}-{engine}")
            if not kept.exists():
                assert trace(loaded, batch, path, opset, engine, run, fixed) == engine
                shutil.copytree(path.parent, kept)
            for file in kept.iterdir():
                shutil.copy(file, path.parent)
            return engine

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_adapter, "write_onnx", once)
            return export(config_of(models(name), root / "-".join([name, *overrides]), *overrides))

    return make
