"""The estimate of `hap cost` beside what records take: those of `digits`, or of another spec, made here and now.

Both on this machine, one after the other, for on a busy one the seconds of another day say nothing. The first seed of
each case; the seconds that the committed records took stand beside them.

    python benchmarks/bench_cost.py digits
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import command
import pytest

from hap.harness.cli.bill import STAGES
from hap.harness.cli.estimate import estimate
from hap.harness.processes.files import caching
from hap.harness.records import store
from hap.harness.run import run
from hap.harness.spec.spec import load_spec

ROOT = Path(__file__).parents[1]
SPECS = {"digits": ROOT / "reproductions" / "digits.toml"}
BAR = 2.0  # the estimate is within so many times of what the records take
KEPT = {"task": "train", "trace": "trace", "score": "score", "finetune": "fine-tune", "evaluate": "evaluate"}


def measure(name, smoke):
    spec = load_spec(SPECS[name])
    spec = spec.model_copy(update={"seeds": spec.seeds[:1]})
    known, made = {}, []
    with TemporaryDirectory() as folder, caching(Path(folder)):
        priced = estimate(spec, lambda line: None)
        for case in list(spec.cases.values())[: 1 if smoke else None]:
            made.append(run(case, spec.seeds[0], known=known).seconds)
    before = [run.seconds for runs in store.evidence(load_spec(SPECS[name]), ROOT / "results").values() for run in runs]
    took, committed = by_stage(made), by_stage(before)
    per = len(load_spec(SPECS[name]).seeds)
    return {
        "network": name,
        "smoke": smoke,
        "estimated": {stage: priced.stages[stage].seconds for stage in STAGES},
        "took": took,
        "committed": {stage: seconds / per for stage, seconds in committed.items()},
    }


def by_stage(records):
    found = dict.fromkeys(STAGES, 0.0)
    for seconds in records:
        for part, stage in KEPT.items():
            found[stage] += seconds.get(part, 0.0)
    return found


def broken(found):
    ratio = sum(found["estimated"].values()) / sum(found["took"].values())
    held = found["smoke"] or 1 / BAR <= ratio <= BAR
    return [] if held else [f"{found['network']}: estimated {ratio:.2f} times what it took"]


def table(found):
    lines = [f"\n{found['network'] + ', a seed of each case, seconds':40}{'estimated':>10}{'took':>8}{'committed':>11}"]
    columns = [found[which] for which in ("estimated", "took", "committed")]
    for stage in STAGES:
        lines.append(f"  {stage:38}{columns[0][stage]:10.2f}{columns[1][stage]:8.2f}{columns[2][stage]:11.2f}")
    sums = [sum(each.values()) for each in columns]
    return "\n".join([*lines, f"  {'all':38}{sums[0]:10.2f}{sums[1]:8.2f}{sums[2]:11.2f}"])


@pytest.mark.parametrize("name", SPECS)
def test_the_estimate_beside_what_records_take(benchmark, name, capsys):
    found = benchmark.pedantic(measure, (name, "BENCH_SMOKE" in os.environ), rounds=1, iterations=1)
    benchmark.extra_info |= found
    with capsys.disabled():  # the comparison is the point
        print(table(found))
    assert not broken(found)


def main():
    command.run(command.options(__doc__, SPECS).parse_args(), SPECS, measure, table, broken)


if __name__ == "__main__":
    main()
