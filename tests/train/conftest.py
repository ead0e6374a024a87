import pytest

from tests.kits import make_kit


@pytest.fixture(scope="session")
def text(models, data):
    return make_kit("text-classification", models, data)
