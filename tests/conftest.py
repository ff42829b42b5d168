"""What every test runs under: shapes checked by jaxtyping and beartype, one thread a worker, CI without chance."""

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import numpy as np
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


def pytest_configure(config: pytest.Config) -> None:
    """Compares figures with their baselines unasked; not set in pyproject.toml, for the plugin is the tests' alone."""
    config.option.mpl = True


@pytest.fixture(scope="session")
def hapdata(request: pytest.FixtureRequest) -> Path:
    """A folder with CIFAR-10, checkpoints, a sample of ImageNet: $HAP_DATA, else from ../shared once, else a skip."""
    given = os.environ.get("HAP_DATA")
    if given:
        return Path(given)
    if not TOOL.is_file():
        pytest.skip(f"CIFAR-10 not found: HAP_DATA is not set, and {TOOL} is not there to unpack a copy")
    cached = Path(request.config.cache.mkdir("hap")) / "unpacked"
    if not cached.exists():
        with tempfile.TemporaryDirectory(dir=cached.parent) as fresh:
            parts = ("cifar10", "checkpoints", "imagenet-sample")
            subprocess.run([sys.executable, TOOL, fresh, *parts], check=True, capture_output=True)
            if not cached.exists():  # another worker may have been faster
                (Path(fresh)).rename(cached)
                Path(fresh).mkdir()  # for the context manager to remove
    return cached


CHECKPOINTS = {20: "resnet20-12fca82f.th", 32: "resnet32-d509ac18.th", 56: "resnet56-4bfd9763.th"}


@pytest.fixture(scope="session")
def fakedata(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder laid out as $HAP_DATA, for tests that must not need the real one: random images, untrained weights.

    Three different files of images: the first batch, which the next three repeat, the last one, and the test batch.
    """
    from hap.harness.tasks.nets import resnet

    root = tmp_path_factory.mktemp("data")
    folder, weights = root / "cifar-10-batches-py", root / "checkpoints" / "cifar10"
    folder.mkdir()
    weights.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("data_batch_1", "data_batch_5", "test_batch"):
        pixels = np.frombuffer(rng.bytes(10000 * 3072), np.uint8).reshape(10000, 3072)
        record = {b"data": pixels, b"labels": rng.integers(0, 10, 10000).tolist()}
        (folder / name).write_bytes(pickle.dumps(record, protocol=2))
    for name in ("data_batch_2", "data_batch_3", "data_batch_4"):
        (folder / name).symlink_to("data_batch_1")
    for depth, name in CHECKPOINTS.items():
        state = resnet(depth, rng=torch.Generator().manual_seed(depth)).state_dict()
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, weights / name)
    yield root
    shutil.rmtree(root)  # 130 MB, of which pytest would keep the last three


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No type checks: for a refusal of the function's own, which the checker would forestall."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
