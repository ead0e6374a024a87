from collections.abc import Iterator

import pytest

from tests.endpoint.server import Server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server, and waits that take no time."""
    monkeypatch.setenv("KDTOOL_ENDPOINT_BACKOFF", "0.01")
    monkeypatch.delenv("KDTOOL_ENDPOINT_KEY", raising=False)
    with Server() as running:
        yield running
