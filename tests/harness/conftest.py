import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
TOOL = CHECKOUT.parent / "shared" / "tools" / "unpack_data.py"


@pytest.fixture(scope="session")
def hapdata(request: pytest.FixtureRequest) -> Path:
    """A folder with CIFAR-10 and its checkpoints: $HAP_DATA, else unpacked once from ../shared, else a skip."""
    given = os.environ.get("HAP_DATA")
    if given:
        return Path(given)
    if not TOOL.is_file():
        pytest.skip(f"CIFAR-10 not found: HAP_DATA is not set, and {TOOL} is not there to unpack a copy")
    cached = Path(request.config.cache.mkdir("hap")) / "data"
    if not cached.exists():
        with tempfile.TemporaryDirectory(dir=cached.parent) as fresh:
            subprocess.run([sys.executable, TOOL, fresh, "cifar10", "checkpoints"], check=True, capture_output=True)
            if not cached.exists():  # another worker may have been faster
                (Path(fresh)).rename(cached)
                Path(fresh).mkdir()  # for the context manager to remove
    return cached


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of trained digits, shared by the tests of one process."""
    return tmp_path_factory.mktemp("cache")
