from collections.abc import Callable
from functools import cache

import pytest

from tests.kits import Kit, make_kit


@pytest.fixture(scope="session")
def kit(models, data) -> Callable[[str], Kit]:
    """`kit(TASK)`: tiny models and encoded rows, made once; methods built from it are copies."""

    @cache
    def make(task: str) -> Kit:
        return make_kit(task, models, data)

    return make
