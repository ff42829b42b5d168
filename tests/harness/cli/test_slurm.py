import os
import re
import signal
import time
from pathlib import Path

import pytest
from fakes import write_spec

from hap import HapError
from hap.harness.cli import slurm
from hap.harness.make import Job
from hap.harness.spec.spec import load_spec
from hap.harness.train.recipe import Recipe

submitit = pytest.importorskip("submitit", reason="submitit is not installed: no jobs can be sent")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The local executor, its files in a folder of the test."""
    monkeypatch.setenv("HAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(slurm, "EVERY", 0.05)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def records(folder, cases=("hap",)):
    file = write_spec(folder)
    spec = load_spec(file)
    return [
        slurm.Record(file, Job(spec.cases[case], seed, folder / "results", alone=f"hap record x {case} {seed}"))
        for case in cases
        for seed in spec.seeds
    ]


def shell(text):
    """A job that runs a line of shell in place of hap."""
    return lambda record, *rest: slurm.Job(("sh", "-c", text.format(seed=record.job.seed)), str(Path.cwd()), rest[-1])


@pytest.mark.parametrize(
    ("given", "table"),
    [
        (["partition=gpu,gpus=1"], {"partition": "gpu", "gpus": 1, "cluster": "slurm"}),
        (["cluster=local", "jobs=2,ranks=4"], {"cluster": "local", "jobs": 2, "ranks": 4}),
    ],
)
def test_options_are_read(given, table):
    assert slurm.options(given) == table


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gpu", "--slurm: key=value expected, with one of cluster, jobs, ranks, .*; found 'gpu'"),
        ("queue=x", "found 'queue=x'"),
        ("gpus=many", "gpus must be a whole number, found 'many'"),
        ("jobs=0", "jobs must be at least 1, found '0'"),
        ("partition=", "partition must be a name, found ''"),
        ("cluster=pbs", "cluster must be one of slurm, local, found 'pbs'"),
    ],
)
def test_options_that_are_wrong_are_one_line(given, message):
    with pytest.raises(HapError, match=message):
        slurm.options([given])


def test_a_machine_without_slurm_says_so(cluster):
    if os.path.exists("/usr/bin/sbatch"):
        pytest.skip("this machine has slurm")
    with pytest.raises(HapError, match=r"--slurm: .*(sbatch|slurm|Slurm)"):
        slurm.fan_out(records(cluster), slurm.options(["partition=gpu"]), print)


def test_the_command_of_a_job_is_that_of_one_record(cluster):
    (record, *_) = records(cluster)
    command = slurm._job(record._replace(job=record.job._replace(again=True)), {}, None).command
    assert command[1:] == (
        *("-m", "hap", "record", str(record.spec), "hap", "0", "--results", str(record.job.results), "--again"),
    )
    several = slurm._job(record, {"ranks": 8}, None).command
    assert several[1:6] == ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8")
    assert several[6:9] == ("-m", "hap", "record")


def test_of_records_that_need_one_trained_model_one_comes_first_and_the_shortest(cluster, monkeypatch):
    monkeypatch.setattr("fakes.task", lambda seed, *, width=4, fit=None: None)  # as a task that trains its model
    chains = slurm._chains(records(cluster, ("hap", "random")))
    assert [[(r.job.case.name, r.job.seed) for r in chain] for chain in chains] == [
        [("hap", 0), ("random", 0)],
        [("hap", 1), ("random", 1)],
        [("hap", 2), ("random", 2)],
    ]
    long, short = records(cluster, ("hap", "random"))[::3]
    slow = long.job.case.model_copy(update={"finetune": Recipe(epochs=90, lr=0.1)})
    long = long._replace(job=long.job._replace(case=slow))
    assert [record.job.case.name for record in slurm._chains([long, short])[0]] == ["random", "hap"]


def test_a_model_that_is_not_trained_keeps_no_record_waiting(cluster):
    assert [len(chain) for chain in slurm._chains(records(cluster, ("hap", "random")))] == [1] * 6


@pytest.mark.slow
def test_the_others_go_when_their_first_has_ended(cluster, monkeypatch):
    monkeypatch.setattr("fakes.task", lambda seed, *, width=4, fit=None: None)
    line = "test -e made{seed} && touch after{seed}; touch made{seed}"
    monkeypatch.setattr(slurm, "_job", shell(line))
    slurm.fan_out(records(cluster, ("hap", "random")), slurm.options(["cluster=local,jobs=6"]), print)
    assert len(list(cluster.glob("after*"))) == 3


def test_on_one_machine_each_job_has_gpus_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert slurm._slots({"cluster": "local", "jobs": 3}, 9) == ["0", "1", "2"]
    assert slurm._slots({"cluster": "local", "jobs": 2, "ranks": 2}, 9) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert slurm._slots({"cluster": "local", "jobs": 2, "gpus": 1}, 9) == ["5", "7"]
    with pytest.raises(HapError, match="3 jobs of 1 GPUs expected to fit, found 2 GPUs here"):
        slurm._slots({"cluster": "local", "jobs": 3}, 9)
    assert slurm._slots({"cluster": "slurm"}, 3) == [None] * 3


def test_the_devices_of_a_job_are_what_its_command_sees(cluster):
    job = slurm.Job(("sh", "-c", 'test "$CUDA_VISIBLE_DEVICES" = 5,7'), str(cluster), "5,7")
    assert job() == 0


def test_nothing_to_make_needs_no_cluster(cluster):
    slurm.fan_out([], slurm.options(["partition=gpu"]), print)


@pytest.mark.slow
def test_a_cluster_that_refuses_a_job_is_one_line_and_the_others_run(cluster, monkeypatch):
    class Executor:
        def __init__(self, real):
            self.real, self.count = real, 0

        def submit(self, job):
            self.count += 1
            if self.count == 1:
                raise submitit.core.utils.FailedJobError("sbatch: error: invalid partition")
            return self.real.submit(job)

    real = slurm._executor
    monkeypatch.setattr(slurm, "_executor", lambda given: Executor(real(given)))
    monkeypatch.setattr(slurm, "_job", shell("touch made{seed}"))
    (line,) = slurm.fan_out(records(cluster), slurm.options(["cluster=local,jobs=3"]), print)
    assert re.match(r"table: hap seed 0 is BROKEN: .*invalid partition", line)
    assert len(list(cluster.glob("made*"))) == 2


@pytest.mark.slow
def test_jobs_run_and_are_told_of(cluster, monkeypatch):
    monkeypatch.setattr(slurm, "_job", shell("touch made{seed}"))
    told = []
    slurm.fan_out(records(cluster), slurm.options(["cluster=local,jobs=2"]), told.append)
    assert sorted(file.name for file in cluster.glob("made*")) == ["made0", "made1", "made2"]
    assert sum(line.endswith(": there") for line in told) == 3
    assert len(told) == 6


@pytest.mark.slow
def test_no_more_jobs_at_once_than_asked(cluster, monkeypatch):
    """Each job looks whether another is there while it works."""
    line = "ls running* 2>/dev/null && touch crowd{seed}; touch running{seed}; sleep 0.3; rm running{seed}"
    monkeypatch.setattr(slurm, "_job", shell(line))
    slurm.fan_out(records(cluster), slurm.options(["cluster=local"]), print)
    assert not list(cluster.glob("crowd*"))


@pytest.mark.slow
def test_a_job_that_fails_is_one_line_and_the_others_end(cluster, monkeypatch):
    monkeypatch.setattr(
        slurm, "_job", shell("test {seed} != 1 || {{ echo 'hap: no data' >&2; exit 2; }}; touch made{seed}")
    )
    (line,) = slurm.fan_out(records(cluster), slurm.options(["cluster=local,jobs=3"]), print)
    says = r"table: hap seed 1 is BROKEN: no data; log .*\.err; to repeat it: hap record x hap 1"
    assert re.fullmatch(says, line)
    assert sorted(file.name for file in cluster.glob("made*")) == ["made0", "made2"]


@pytest.mark.slow
def test_a_job_that_dies_is_one_line(cluster, monkeypatch):
    monkeypatch.setattr(slurm, "_job", shell("kill -9 $PPID"))  # the process that submitit started
    assert len(slurm.fan_out(records(cluster), slurm.options(["cluster=local,jobs=3"]), print)) == 3


@pytest.mark.slow
def test_a_command_that_a_signal_ends_is_told_with_the_signal_and_how_to_repeat_it(cluster, monkeypatch):
    monkeypatch.setattr(slurm, "_job", shell("kill -ABRT $$"))
    lines = slurm.fan_out(records(cluster), slurm.options(["cluster=local,jobs=3"]), print)
    says = (
        r"table: hap seed 0 is BROKEN: its process was ended by SIGABRT; log .*\.err; to repeat it: hap record x hap 0"
    )
    assert re.fullmatch(says, min(lines))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the job's process is found through /proc")
def test_a_job_that_was_preempted_continues(cluster, monkeypatch):
    """Its first time it waits to be preempted; it is queued again, and finds what it did before."""
    line = "test -e begun && touch ended || {{ touch begun; exec sleep 60; }}"
    monkeypatch.setattr(slurm, "_job", shell(line))
    (record, *_) = records(cluster)
    executor = slurm._executor(slurm.options(["cluster=local"]))
    job = executor.submit(slurm._job(record, {}, None))
    deadline = time.monotonic() + 60
    while not (cluster / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    start = time.monotonic()
    (task,) = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
    os.kill(int(task), signal.SIGUSR2)  # what slurm sends, as submitit asks it to
    while not (cluster / "ended").exists() and time.monotonic() < start + 50:
        time.sleep(0.05)
    assert (cluster / "ended").exists()
    while not job.done() and time.monotonic() < start + 55:
        time.sleep(0.05)
    assert slurm._wrong(job) is None
