import gzip
import json

import pytest

from kdtool.data.sources import load_data
from kdtool.run import Run
from kdtool.sections import DataSection


class Listener:
    """A reporter that remembers."""

    def __init__(self):
        self.lines = []

    def info(self, message):
        self.lines.append(message)

    warn = info

    def progress(self, stage, done, total, facts):
        pass


@pytest.fixture
def listener():
    return Listener()


@pytest.fixture
def load(listener):
    def call(source, columns=("text", "label"), optional=("text_pair",), *, seed=0, score_only=False, **data):
        run = Run(seed=seed, reporter=listener, offline=True)
        return load_data(DataSection(source=str(source), **data), columns, optional, run, score_only=score_only)

    return call


@pytest.fixture
def write():
    def call(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text)
        return path

    return call


@pytest.fixture
def rows():
    return [{"text": f"text {i}", "label": i % 2} for i in range(20)]
