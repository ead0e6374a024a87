"""Exports shared by the tests: a process pays some ten seconds for its first."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from kdtool.config import load_config
from kdtool.pipelines import export
from kdtool.proof import Result
from kdtool.sections import RunConfig

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
    """`exported(NAME, *overrides)`: the result of an ONNX export of a tiny model, made once."""
    root = tmp_path_factory.mktemp("exports")

    @cache
    def make(name: str, *overrides: str) -> Result:
        return export(config_of(models(name), root / "-".join([name, *overrides]), *overrides))

    return make
