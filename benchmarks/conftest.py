"""Benchmarks are called bench_*.py, so that the tests do not collect them."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
