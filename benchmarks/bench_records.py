"""Ten records of a tiny network, in a worker process and in this one: medians of rounds, the worker started before.

The bar: a worker takes at most 10 % longer, for it imports torch once and keeps what is known of a dense model. The
seconds of its start are in the table beside it; a process for each record would take them ten times.
"""

import time
from pathlib import Path
from statistics import median

import tiny

from hap.harness.make import Job, ensure
from hap.harness.processes.workers import InProcess, Worker
from hap.harness.spec.spec import load_spec

ROUNDS, MOST = 5, 1.1
BUDGETS = [round(0.3 + 0.05 * i, 2) for i in range(10)]


def seconds(executor, cases, folder):
    start = time.perf_counter()
    for case in cases:
        executor(ensure, Job(case, 0, folder))
    return time.perf_counter() - start


def test_ten_records_in_a_worker(benchmark, tmp_path, monkeypatch):
    monkeypatch.setenv("HAP_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "reproductions" / "tiny.toml"
    path.parent.mkdir()
    path.write_text(tiny.SPEC.partition("[[claims]]")[0].replace("[0.5, 0.7]", str(BUDGETS)))
    cases = list(load_spec(path).cases.values())
    with Worker() as worker:
        first = [
            seconds(executor, cases[:1], tmp_path / "warm" / str(i)) for i, executor in enumerate((worker, InProcess()))
        ]
        taken = {"worker": [], "here": []}
        for number in range(ROUNDS):  # one after the other, for a busy machine slows both
            for name, executor in (("worker", worker), ("here", InProcess())):
                taken[name].append(seconds(executor, cases, tmp_path / name / str(number)))
        found = {name: median(each) for name, each in taken.items()}
        benchmark.extra_info |= found | {"start_seconds": first[0] - first[1]}
        benchmark.pedantic(seconds, args=(worker, cases, Path(tmp_path / "last")), rounds=1)
    assert found["worker"] < MOST * found["here"]
