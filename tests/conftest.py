"""What every test runs under: shapes checked by jaxtyping and beartype, one thread a worker, CI without chance."""

import os
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from hypothesis import settings

pytest_plugins = ["pytester"]

# A hook sees only imports that are still to come: what `-p hap.harness.plugin` has imported stays as it is.
# An int is a float, as PEP 484 has it.
jaxtyping.install_import_hook("hap", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

settings.register_profile("hap", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("hap")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No type checks: for a refusal of the function's own, which the checker would forestall."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
