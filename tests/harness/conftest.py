from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of trained digits, shared by the tests of one process."""
    return tmp_path_factory.mktemp("cache")
