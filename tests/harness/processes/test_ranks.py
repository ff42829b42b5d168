import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import together
import torch

from hap import HapError
from hap.harness.make import Job, ensure
from hap.harness.processes import ranks
from hap.harness.spec.spec import load_spec
from hap.harness.supplied import Share
from hap.harness.train.loop import generator

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

HERE = Path(__file__).parents[1]
ROOT = HERE.parents[1]
SPEC = """
title = "A small one"
paper = "none: a test"
tier = "quick"
seeds = [0]
task = "hap.harness.tasks.digits_preresnet:task"

[finetune]
epochs = {epochs}
lr = 0.05

[cases.hap]
score = "hap.methods:hessian_trace"
implant = "hap.implants:centre_tap"
budget = {{params = 0.7, implant = 0.1}}

[[claims]]
text = "more than 60 % of the parameters go"
source = "this test"
case = "hap"
metric = "params_pruned"
op = ">="
value = 60
over = "seeds"
family = "sizes"
"""


def launched(count, *command, cwd=ROOT, **env):
    """A job of torchrun, in a session of its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    path = os.pathsep.join([str(ROOT), str(HERE)])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **{name: str(v) for name, v in env.items()}}
    return subprocess.Popen(
        [*torchrun, *map(str, command)],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(job, seconds=300):
    """What it said, once it ended; killed with all its ranks where it does not."""
    try:
        return job.communicate(timeout=seconds)[0]
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two ranks made of everything."""
    file = tmp_path_factory.mktemp("two") / "out.json"
    job = launched(2, HERE / "together.py", file)
    said = ended(job)
    assert job.returncode == 0, said
    assert "Warning" not in said
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield together.measured(tmp_path_factory.mktemp("one"))
    torch.set_num_threads(before)


@pytest.mark.slow
def test_two_ranks_are_two(one, two):
    assert (one["world"], two["world"]) == (1, 2)
    assert one["params"] == two["params"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["exact", "one batch", "plain net", "weighted", "drawn", "probes"])
def test_the_curvature_of_two_ranks_is_that_of_one(one, two, what):
    """Five batches, three for a rank and two for the other; of one batch, each has its samples. Draws are the same."""
    assert max(one[what]) > 0
    assert two[what] == pytest.approx(one[what], rel=2e-5)


def test_what_is_drawn_for_a_batch_hangs_on_its_place_and_the_round_alone(monkeypatch):
    def drawn(rank, world):
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        monkeypatch.setattr(ranks, "world", lambda: world)
        rng = generator(3, "score")
        mine = Share([(torch.full((2, 1), float(n)), torch.zeros(2)) for n in range(5)], rng)
        rounds = [[(float(x[0]), float(torch.rand(rank + 1, generator=rng)[0])) for x, _ in mine] for _ in range(2)]
        assert len(mine) == len(rounds[0])
        return rounds

    whole = drawn(0, 1)
    assert len({value for each in whole for _, value in each}) == 10
    for world in (2, 3, 5):
        for number in (0, 1):
            parts = [each for rank in range(world) for each in drawn(rank, world)[number]]
            assert sorted(parts) == sorted(whole[number])


@pytest.mark.slow
def test_probes_of_a_batch_that_ranks_share_are_drawn_by_each_and_near(one, two):
    """They cannot be equal, and must not: each rank draws its own."""
    assert two["probes of one batch"] != one["probes of one batch"]
    found, exact = torch.tensor(two["probes of one batch"]), torch.tensor(one["one batch"])
    assert torch.corrcoef(torch.stack([found, exact]))[0, 1] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("what", ["evaluate", "recalibrated"])
def test_evaluation_counts_every_image_once(one, two, what):
    """67 images in batches of 10: 34 for one rank and 33 for the other, each with a ragged last batch."""
    assert two[what]["accuracy"] == one[what]["accuracy"]
    assert two[what]["loss"] == pytest.approx(one[what]["loss"], rel=1e-6)


def same(one, two):
    """Equal but for how sums round over two epochs of ten steps."""
    for row, other in zip(one["rows"], two["rows"], strict=True):
        assert other == pytest.approx(row, rel=1e-4)
    assert one["state"].keys() == two["state"].keys()
    for name, values in one["state"].items():
        assert two["state"][name] == pytest.approx(values, rel=1e-3, abs=1e-4), name
    assert two["sums"] == pytest.approx(one["sums"], rel=1e-3, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", together.RECIPES)
def test_a_training_on_two_ranks_is_that_of_one(one, two, recipe):
    """With BatchNorm over all ranks, and a last batch of three; without it, micro-batches change nothing either."""
    # of which BatchNorm sees parts: two of 8 on one rank are one of 16 on two
    same(one["trained"]["whole" if recipe == "micro" else recipe], two["trained"][recipe])


@pytest.mark.slow
def test_it_learned(two):
    """Else equal results would say nothing."""
    rows = two["trained"]["plain"]["rows"]
    assert rows[-1][0] < 0.8 * rows[0][0]


@pytest.mark.slow
def test_class_weights_count_over_all_ranks(one, two):
    same(one["trained weighted"], two["trained weighted"])


@pytest.mark.slow
def test_a_training_that_is_kept_gives_every_rank_its_epochs(one, two):
    same(one["trained"]["plain"], two["kept"])


@pytest.mark.slow
def test_a_batch_of_fewer_samples_than_ranks_is_left_out_and_told(one, two):
    assert one["short"] == []
    assert two["short"] == ["batches of fewer than 2 samples, one a rank, were left out"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a spec, and the record that two ranks made of it, the trained model included."""
    root = tmp_path_factory.mktemp("project")
    (root / "reproductions").mkdir()
    (root / "reproductions" / "small.toml").write_text(SPEC.format(epochs=6))
    job = hap(root, "whole")
    said = ended(job)
    assert job.returncode == 0, said
    return root, said


def hap(root, results, count=2):
    command = ["-m", "hap", "run", "small", "--results", root / results]
    return launched(count, *command, cwd=root, HAP_CACHE=root / "cache")


def record(root, results):
    (file,) = (root / results / "small").rglob("seed0.json")
    return json.loads(file.read_text())


@pytest.mark.slow
def test_a_run_by_torchrun_writes_one_record_and_one_report(project):
    root, said = project
    assert said.count("small [1/1] hap seed 0: there after") == 1
    assert said.count("UNDECIDED") == 1  # for there is one seed
    assert {file.name for file in (root / "whole").glob("*")} >= {"VERDICTS.md", "small", "tables"}
    assert record(root, "whole")["environment"]["ranks"] == 2


@pytest.mark.slow
def test_it_is_the_run_of_one_rank_but_for_rounding(project, tmp_path, monkeypatch):
    """The dense model too was trained by two; a training of ten epochs spreads the rounding, so the band is wide."""
    root, _ = project
    monkeypatch.setenv("HAP_CACHE", str(tmp_path))
    (case,) = load_spec(root / "reproductions" / "small.toml").cases.values()
    one, two = ensure(Job(case, 0, tmp_path / "one")), record(root, "whole")
    assert two["key"] == one.key
    assert "ranks" not in one.environment
    assert two["cost"]["dense"]["params"] == one.cost["dense"]["params"]
    assert two["cost"]["pruned"]["params"] == pytest.approx(one.cost["pruned"]["params"], rel=0.1)
    assert two["metrics"]["dense"]["accuracy"] == pytest.approx(one.metrics["dense"]["accuracy"], abs=2)
    assert two["metrics"]["selected"]["accuracy"] == pytest.approx(one.metrics["selected"]["accuracy"], abs=4)


IMAGENET = """
title = "ResNet50 on a few pictures"
paper = "none: a test"
tier = "quick"
seeds = [0]
task = {use = "hap.harness.tasks.imagenet_resnet50:task", smoke = true, batch = 3}

[finetune]
epochs = 1
lr = 1e-5
batch_size = 8
ema = 0.5
label_smoothing = 0.1

[cases.hap]
score = {use = "hap.methods:hessian_trace", columns = 1}
budget = {params = 0.5}
"""


@pytest.mark.slow
def test_resnet50_on_folders_of_pictures_is_shared_by_two_ranks(imagenets, tmp_path):
    """Decoding, curvature over 1,000 classes, training and evaluation; the last batch of the calibration has two."""
    (tmp_path / "reproductions").mkdir()
    (tmp_path / "reproductions" / "small.toml").write_text(IMAGENET)
    found = []
    for count in (1, 2):
        place = {"HAP_DATA": imagenets, "HAP_IMAGENET": imagenets / "imagenet", "HAP_CACHE": tmp_path / str(count)}
        command = ["-m", "hap", "run", "small", "--results", tmp_path / f"results-{count}"]
        job = launched(count, *command, cwd=tmp_path, TORCH_HOME=tmp_path, HAP_WORKERS=1, **place)
        said = ended(job)
        assert job.returncode == 0, said
        found.append(record(tmp_path, f"results-{count}"))
    one, two = found
    assert two["environment"]["ranks"] == 2
    assert two["data"] == one["data"]
    assert two["plan"] == one["plan"]
    for stage, rel in (("dense", 1e-5), ("one_shot", 1e-4), ("selected", 1e-2)):
        assert two["metrics"][stage] == pytest.approx(one["metrics"][stage], rel=rel), stage


def processes(job):
    """The ranks of a job: their numbers and processes."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            started = dict(each.partition("=")[::2] for each in (process / "environ").read_text().split("\0"))
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            if "LOCAL_RANK" in started and parent == str(job.pid):
                yield int(started["RANK"]), int(process.name)
        except (OSError, ValueError):
            continue


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="ranks are found through /proc, which is Linux")
def test_a_rank_that_is_killed_ends_the_job_which_goes_on_to_the_same_result(project):
    (root, _), results = project, "killed"
    job = hap(root, results)
    deadline = time.monotonic() + 200
    while not list((root / "cache" / "training").rglob("epoch-0002.json")) and time.monotonic() < deadline:
        assert job.poll() is None, ended(job)
        time.sleep(0.02)
    os.kill(dict(processes(job))[1], signal.SIGKILL)
    start = time.monotonic()
    said = ended(job, seconds=60)
    assert time.monotonic() - start < 60
    assert job.returncode != 0
    assert "SIGKILL" in said
    assert not (root / results).exists() or not list((root / results).rglob("seed0.json"))
    again = hap(root, results)
    said = ended(again)
    assert again.returncode == 0, said
    found, expected = record(root, results), record(root, "whole")
    assert found["metrics"] == expected["metrics"]
    assert [row["validation"] for row in found["epochs"]] == [row["validation"] for row in expected["epochs"]]


@pytest.mark.slow
def test_results_that_cannot_be_written_are_found_before_anything_is_trained(tmp_path):
    (tmp_path / "reproductions").mkdir()
    (tmp_path / "reproductions" / "small.toml").write_text(SPEC.format(epochs=6))
    (tmp_path / "file").write_text("not a folder")
    job = hap(tmp_path, "file")
    said = ended(job)
    assert job.returncode != 0
    assert said.count("cannot be written (") == 1
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("own", "local", "rank", "said"),
    [
        (None, None, None, "wrong"),
        ("0", "0", 0, "wrong"),
        ("1", "1", 0, None),
        ("1", "1", 1, "rank 1: wrong"),
        ("9", "1", None, None),  # before ranks join, one of each machine says it
        ("8", "0", None, "rank 8: wrong"),
    ],
)
def test_of_several_ranks_one_says_what_is_wrong(own, local, rank, said, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if own is not None:
        for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": own, "LOCAL_RANK": local}.items():
            monkeypatch.setenv(name, value)
    error = HapError("wrong")
    if rank is not None:
        error.__dict__["rank"] = rank
    assert ranks.line(error) == said


def test_what_rank_0_could_not_do_every_rank_is_told(monkeypatch):
    """On one rank; on two it is the results that cannot be written."""

    def fail():
        raise HapError("no")

    with pytest.raises(HapError, match="no"):
        ranks.shared(fail)
    assert ranks.gathered(3) == [3]
    ranks.agreed("a plan", "the same")


def test_a_rank_without_a_gpu_of_its_own_is_one_line(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("HAP_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("RANK", "11")
    with pytest.raises(HapError, match="a GPU for each rank of a machine expected, found 2") as raised, ranks.joined():
        pass
    assert ranks.line(raised.value) == "rank 11: a GPU for each rank of a machine expected, found 2"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.distributed.DistBackendError("NCCL communicator was aborted"), True),
        (torch.distributed.DistNetworkError("Connection reset"), True),
        (RuntimeError("Connection closed by peer"), False),  # there are no peers here
        (ValueError("gloo"), False),
    ],
)
def test_a_lost_rank_is_told_from_a_defect(error, lost):
    assert ranks.lost(error) == lost


PROGRAM = """
import os, sys
from hap import HapError
from hap.harness.processes import ranks
from hap.harness.cli.terminal import told

@told
def command():
    with ranks.joined():
        ranks.gathered(1)
        if ranks.rank() == 1:
            {what}
        ranks.gathered(2)

command()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("raise HapError('its data is not here')", "hap: rank 1: its data is not here"),
        ("raise KeyError('a defect')", "KeyError: 'a defect'"),
        ("raise MemoryError('all of it')", "hap: memory ran out (all of it)"),
        ("os._exit(7)", "hap: rank 0: another rank ended ("),
    ],
)
def test_what_happens_on_one_rank_is_told_and_ends_the_job(what, line, tmp_path):
    """The other waits in a collective, and must neither hang nor drown the line in a traceback of its own."""
    (tmp_path / "program.py").write_text(PROGRAM.replace("{what}", what))
    job = launched(2, tmp_path / "program.py", cwd=tmp_path)
    start = time.monotonic()
    said = ended(job, seconds=90)
    assert time.monotonic() - start < 60
    assert job.returncode != 0
    assert line in said
    assert "gloo/transport" not in said or "another rank ended" in said


@pytest.mark.slow
def test_ranks_with_other_data_are_refused(tmp_path):
    program = (
        "from hap.harness.processes import ranks\nfrom hap.harness.cli.terminal import told\n@told\ndef command():\n"
    )
    program += "    with ranks.joined():\n        ranks.agreed('noise: the data', str(ranks.rank()))\ncommand()\n"
    (tmp_path / "program.py").write_text(program)
    job = launched(2, tmp_path / "program.py", cwd=tmp_path)
    assert "noise: the data: must be the same on every rank, found" in ended(job, seconds=90)
    assert job.returncode != 0
