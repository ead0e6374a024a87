"""The fixture `golden`, for tests that look at all cases of a file at once."""

from collections.abc import Callable, Iterator

import pytest
from torch import Tensor

from ._cases import Case, Tolerance, load

Golden = Callable[[str], Iterator[tuple[Case, dict[str, Tensor], Tolerance]]]


@pytest.fixture(scope="session")
def golden() -> Golden:
    """`golden(NAME)` yields (case, tensors, tolerance); see `_cases.cases` for one test per case."""

    def walk(name: str) -> Iterator[tuple[Case, dict[str, Tensor], Tolerance]]:
        for case in load(name):
            yield case, case.tensors, case.tolerance

    return walk
