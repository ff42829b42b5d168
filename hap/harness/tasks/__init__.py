"""Workloads: one module a workload, with a function `task(seed, *, options) -> Task` in it."""
