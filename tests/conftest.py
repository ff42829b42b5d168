"""What every test runs under: shapes checked by jaxtyping and beartype, one thread a worker, CI without chance."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import settings

pytest_plugins = ["pytester"]
TOOL = Path(__file__).parents[2] / "shared" / "tools" / "unpack_data.py"

# A hook sees only imports that are still to come: what `-p hap.harness.plugin` has imported stays as it is.
# An int is a float, as PEP 484 has it.
jaxtyping.install_import_hook("hap", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

settings.register_profile("hap", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("hap")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


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


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No type checks: for a refusal of the function's own, which the checker would forestall."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
