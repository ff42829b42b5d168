import json
import shutil
import subprocess
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch

import hap
from hap import HapError
from hap.cost import params
from hap.harness.processes import provenance
from hap.harness.processes.progress import Clock, silent
from hap.harness.records import freshness, store
from hap.harness.records.record import Run
from hap.harness.run import groups_of, load_task, one_shot, run
from hap.harness.spec.functions import Ref
from hap.harness.spec.spec import Case
from hap.harness.supplied import Dense, agree
from hap.harness.task import Data, Task
from hap.harness.tasks.data import Images, Normalise, calibration, epoch, measure
from hap.harness.tasks.nets import resnet
from hap.harness.train import checkpoints
from hap.harness.train.loop import Recipe, fit, generator
from hap.hessian.losses import CrossEntropy
from hap.methods import magnitude
from hap.plan import Budget
from hap.structure.groups import couple
from hap.structure.tracing import trace
from hap.updates import least_squares

NORMALISE = Normalise((0.5,), (0.25,))
LOOKS: list[tuple[str, dict[str, torch.Tensor]]] = []  # which split was looked at, with which weights


def stripes(n, seed):
    """Images whose class is the row that is bright, with noise."""
    rng = generator(seed, "stripes")
    labels = torch.randint(4, (n,), generator=rng)
    pixels = torch.randint(160, (n, 1, 8, 8), generator=rng)
    for row in range(2):
        pixels[torch.arange(n), 0, 2 * labels + row] += 60
    return Images(pixels.to(torch.uint8), labels)


def task(seed: int, *, spoil: float = 1.0) -> Task:
    """A ResNet-8 of few channels, trained for a second."""
    splits = {"train": stripes(256, 0), "validation": stripes(64, 1), "test": stripes(64, 2)}

    def evaluate(model, split):
        LOOKS.append((split, {name: value.clone() for name, value in model.state_dict().items()}))
        return measure(model, CrossEntropy().call, splits[split], NORMALISE)

    made = Task(
        name="stripes",
        model=resnet(8, (4, 8, 16), classes=4, channels=1, rng=generator(seed, "init")),
        loss=CrossEntropy(),
        batches=calibration(splits["train"], NORMALISE, 64, 32, generator(seed, "calibration")),
        train=partial(epoch, splits["train"], normalise=NORMALISE, pad=0, flip=True),
        train_size=256,
        evaluate=evaluate,
        example=NORMALISE(splits["train"].pixels[:1]),
        data=Data("stripes", "0" * 64, True, ""),
        test_samples=len(splits["test"].labels),
        threads=1,
    )
    fit(made.model, made, Recipe(epochs=3, lr=0.05, batch_size=32), rng=generator(seed, "train"))
    made.model.eval()
    LOOKS.clear()
    return made


def halve(task, groups, budget, *, rng, order: int = 1):
    """A method that is a score of its own."""
    return one_shot(partial(magnitude, order=order))(task, groups, budget, rng=rng)


def flat(model, loss, batches, groups, *, rng):
    """A score that says nothing."""
    return torch.ones(len(groups))


TASK = Ref(use=f"{__name__}:task")
CASE = Case(
    name="hap",
    spec="stripes",
    task=TASK,
    score=Ref(use="hap.methods:hessian_trace", options={"columns": 2}),
    implant=Ref(use="hap.implants:centre_tap"),
    budget=Budget(params=0.5, implant=0.2),
    finetune=Recipe(epochs=3, lr=0.02, batch_size=32, schedule="cosine"),
)


@pytest.fixture(scope="module")
def record():
    events = []
    made = run(CASE, 1, say=events.append)
    return made, events, list(LOOKS)


def changed(**parts):
    return CASE.model_copy(update=parts)


def test_the_record_is_whole_and_comes_back_from_the_store(record, tmp_path):
    made = record[0]
    assert store.load(store.save(made, tmp_path)) == made
    assert store.path(tmp_path, CASE, 1).exists()
    assert json.loads(json.dumps(made.config))["score"]["options"] == {"columns": 2}
    assert {"task", "trace", "score", "plan", "apply", "finetune", "evaluate"} <= made.seconds.keys()
    assert made.environment["threads"] == 1
    assert made.data["name"] == "stripes"
    counts = made.metrics["selected"]["accuracy"] * made.data["test_samples"] / 100
    assert made.data["test_samples"] > 1
    assert counts == pytest.approx(round(counts))
    assert made.code["decides"] == freshness.decides(freshness.entrances(made.config))
    assert freshness.age(made, {}) == freshness.FRESH
    assert list(Run.__dataclass_fields__)[:5] == ["schema", "spec", "case", "key", "seed"]


def test_the_cost_is_that_of_the_plan_and_meets_the_budget(record):
    dense, pruned = record[0].cost["dense"], record[0].cost["pruned"]
    removed = 1 - pruned["params"] / dense["params"]
    assert removed == pytest.approx(record[0].plan["removed"]["params"], abs=1e-9)
    assert 0.5 <= removed < 0.6
    assert pruned["macs"] < dense["macs"]
    assert pruned["latency_seconds"].keys() == {"1", "64"}


def test_the_test_set_is_looked_at_once_by_each_model_and_after_all_training(record):
    splits = [split for split, _ in record[2]]
    assert splits == ["validation"] * 3 + ["test"] * 5  # dense, one shot, three epochs


class Killed(BaseException):
    """What no handler of ours catches."""


def test_a_run_that_was_killed_in_its_fine_tuning_goes_on_to_the_same_record(record, tmp_path, monkeypatch):
    save = checkpoints.Keeper.save

    def killed(keeper, point):
        save(keeper, point)
        if len(point.rows) == 2:
            raise Killed

    monkeypatch.setattr(checkpoints.Keeper, "save", killed)
    with pytest.raises(Killed):
        run(CASE, 1, keep=tmp_path)
    monkeypatch.setattr(checkpoints.Keeper, "save", save)
    events = []
    made = run(CASE, 1, say=events.append, keep=tmp_path)
    assert sum(event == "goes on after epoch 2 of 3" for event in events) == 1
    assert (made.metrics, made.plan, made.key) == (record[0].metrics, record[0].plan, record[0].key)
    assert [row["test"] for row in made.epochs] == [row["test"] for row in record[0].epochs]
    assert made.warnings == record[0].warnings


def test_what_training_notes_is_in_the_record(monkeypatch):
    def broken(model, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    made = run(changed(finetune=replace(CASE.finetune, epochs=1, compile=True)), 1)
    assert made.warnings == ["torch.compile failed, training uncompiled: RuntimeError: no compiler"]


def test_recalibration_is_before_fine_tuning_and_decides_the_key():
    """That the statistics are right, tests/harness/test_batchnorm.py finds out."""
    plain, other = (run(changed(finetune=None, recalibrate=each), 1) for each in (False, True))
    assert plain.plan == other.plan
    assert plain.metrics["one_shot"] != other.metrics["one_shot"]
    assert plain.metrics["dense"] == other.metrics["dense"]
    assert plain.key != other.key


def test_stages_and_epochs_are_the_weights_they_say(record):
    """The oracle is the weights that were looked at: those of validation epoch k are those of test epoch k."""
    made, _, looks = record
    tested = [weights for split, weights in looks if split == "test"]
    validated = [weights for split, weights in looks if split == "validation"]
    for one, other in zip(tested[2:], validated, strict=True):
        assert all(torch.equal(one[name], value) for name, value in other.items())
    assert sum(v.numel() for v in tested[1].values()) < sum(v.numel() for v in tested[0].values())
    rows = made.epochs
    best = max(range(3), key=lambda i: (rows[i]["validation"]["accuracy"], -rows[i]["validation"]["loss"]))
    assert made.metrics["selected"] == rows[best]["test"]
    assert made.metrics["last"] == rows[-1]["test"]
    assert made.metrics["best_test_epoch"]["accuracy"] == max(row["test"]["accuracy"] for row in rows)
    assert made.metrics["dense"]["accuracy"] > made.metrics["one_shot"]["accuracy"]


def test_selection_never_sees_the_test_set(monkeypatch):
    """Validation and test disagree here, so that selecting by the test set would be seen."""

    def contrary(seed):
        made = task(seed)
        epochs = iter([90.0, 80.0, 70.0])
        tests = iter([99.0, 10.0, 50.0, 60.0, 65.0])  # dense, one shot, three epochs

        def evaluate(model, split):
            model.eval()
            return {"accuracy": next(epochs if split == "validation" else tests), "loss": 1.0}

        return replace(made, evaluate=evaluate)

    monkeypatch.setattr(Ref, "load", lambda ref: contrary if ref.use == TASK.use else magnitude)
    made = run(changed(score=Ref(use="hap.methods:magnitude"), implant=None, budget=Budget(params=0.5)), 0)
    found = {stage: numbers["accuracy"] for stage, numbers in made.metrics.items()}
    assert found == {"dense": 99.0, "one_shot": 10.0, "selected": 50.0, "last": 65.0, "best_test_epoch": 65.0}


def test_progress_names_the_stages_and_never_goes_back(record):
    events = record[1]
    assert [str(event) for event in events if ":" not in event] == [
        "task",
        "trace",
        "score",
        "plan",
        "apply",
        "finetune",
        "evaluate",
    ]
    fractions = [event.fraction for event in events]
    assert fractions == sorted(fractions)
    assert sum(event.startswith("epoch ") for event in events) == 3


def test_one_seed_gives_one_record(record):
    again = run(CASE, 1)
    assert again.metrics == record[0].metrics
    assert again.plan == record[0].plan
    rows = [[{**row, "seconds": 0} for row in made.epochs] for made in (again, record[0])]
    assert rows[0] == rows[1]


def test_without_fine_tuning_all_stages_are_the_one_shot():
    made = run(changed(finetune=None, implant=None, budget=Budget(groups=0.3)), 0)
    stages = [made.metrics[stage] for stage in ("one_shot", "selected", "last", "best_test_epoch")]
    assert stages == [stages[0]] * 4
    assert made.epochs == []
    assert made.config.get("finetune") is None


@pytest.mark.parametrize("coupling", ["tied", "union"])
def test_a_method_takes_the_place_of_score_plan_and_apply(coupling):
    method = Ref(use=f"{__name__}:halve", options={"order": 2})
    parts = {"implant": None, "budget": Budget(params=0.4), "finetune": None, "coupling": coupling}
    by_method = run(changed(score=None, method=method, **parts), 0)
    by_score = run(changed(score=Ref(use="hap.methods:magnitude", options={"order": 2}), **parts), 0)
    assert by_method.metrics == by_score.metrics
    assert by_method.plan == by_score.plan
    assert "prune" in by_method.seconds


def trained(task, groups, budget, *, rng):
    """A method that changes the weights that are left, and tells nothing of what it removed."""
    pruned, chosen = halve(task, groups, budget, rng=rng)
    with torch.no_grad():
        for p in pruned.parameters():
            p.mul_(0.5)
    return pruned, replace(chosen, removed={}, budget={"steps": 3})


@pytest.mark.parametrize("budget", [Budget(params=0.4), Budget(macs=0.4)])
def test_a_method_may_train_and_its_plan_is_worked_out_from_its_rows(budget):
    parts = {"score": None, "implant": None, "budget": budget, "finetune": None}
    mine, plain = (run(changed(method=Ref(use=f"{__name__}:{use}"), **parts), 0) for use in ("trained", "halve"))
    assert mine.metrics["one_shot"] != plain.metrics["one_shot"]
    assert mine.plan == {**plain.plan, "budget": {"steps": 3, **plain.plan["budget"]}}
    assert mine.plan["removed"][budget.unit] >= budget.target


@pytest.mark.parametrize("implant", [0.0, 0.1])
@pytest.mark.parametrize("unit", ["params", "macs", "groups"])
def test_the_published_planning_is_accepted(unit, implant):
    """Also where its ratio of groups counts the rows of the classifier, which stay, and so removes fewer."""
    method = Ref(use="hap.harness.upstream:published", options={"score": "hap.methods:magnitude"})
    parts = {"score": None, "implant": None, "finetune": None, "coupling": "union"}
    budget = Budget(**{unit: 0.4}, implant=implant)
    made = run(changed(method=method, budget=budget, **parts), 0)
    assert unit == "groups" or made.plan["removed"][unit] >= 0.4
    assert "ratio" in made.plan["budget"]


def test_a_model_that_is_not_the_one_planned_is_refused(monkeypatch):
    made = task(0)
    groups = couple(made.model, trace(made.model, made.example), "union")
    monkeypatch.setattr("hap.harness.run.apply", lambda model, *_, **__: model)
    with pytest.raises(HapError, match=r"stripes: the pruned model must be the one planned, .* .found 0\.000000."):
        one_shot(magnitude)(made, groups, Budget(params=0.5), rng=generator(0))


def test_the_dense_model_is_left_as_it_was():
    made = task(0)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    groups = couple(made.model, trace(made.model, made.example), "union")
    pruned, _ = one_shot(magnitude)(made, groups, Budget(params=0.5), rng=generator(0))
    fit(pruned, made, Recipe(epochs=1, lr=0.1), rng=generator(0))
    assert all(torch.equal(before[name], value) for name, value in made.model.state_dict().items())


def test_a_clock_keeps_the_seconds():
    clock = Clock(silent)
    assert clock("a", lambda: clock("b", int, "3")) == 3
    assert clock.seconds["a"] >= clock.seconds["b"] > 0


def test_the_code_is_named_by_its_content(tmp_path):
    shutil.copytree(hap.__path__[0], tmp_path / "hap", ignore=shutil.ignore_patterns("__pycache__"))
    copy = tmp_path / "hap"
    assert provenance.code(copy) == {"commit": None, "dirty": None, "sha256": provenance.code()["sha256"]}
    (copy / "harness" / "run.py").write_text("changed")
    assert provenance.code(copy)["sha256"] != provenance.code()["sha256"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_given_only_where_git_keeps_the_files(tmp_path, monkeypatch):
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git = partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True)
    git(["git", "init", "-q"])
    assert provenance.code(package)["commit"] is None  # inside a repository, but not of it
    git(["git", "add", "."])
    git(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"])
    found = provenance.code(package)
    assert len(found["commit"]) == 40
    assert found["dirty"] is False
    (package / "__init__.py").write_text("x = 1")
    assert provenance.code(package)["dirty"] is True
    monkeypatch.setenv("PATH", "")
    assert provenance.code(package)["commit"] is None


def test_the_environment_is_json_and_tells_versions_and_threads(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("numpy", "no-such-package"))
    found = json.loads(json.dumps(provenance.environment(torch.device("cpu"))))
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert list(found["packages"]) == ["numpy"]


def test_the_environment_says_in_one_block_what_of_a_machine_moves_numbers(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = provenance.environment(torch.device("cpu"))["machine"]
    assert found["processor"] == provenance.processor()
    assert found["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert found["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert "driver" not in found
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92600)
    monkeypatch.setattr(provenance, "_said", lambda program, *options: {"nvidia-smi": "580.65\n580.65"}.get(program))
    found = provenance.environment(torch.device("cuda"))["machine"]
    assert (found["driver"], found["cudnn"], found["cuda"]) == ("580.65", "92600", str(torch.version.cuda))
    monkeypatch.setattr(provenance, "_said", lambda *command: None)
    assert provenance.environment(torch.device("cuda"))["machine"]["driver"] == "unknown"


def compared(score, **options):
    return replace_case(
        score=Ref(use=score, options=options), reference=Ref(use="hap.methods:hessian_trace"), finetune=None
    )


def replace_case(**changes):
    return CASE.model_copy(update=changes)


def test_a_reference_tells_how_a_ranking_compares():
    exact = run(compared("hap.methods:hessian_trace"), 0)
    assert exact.metrics["ranking"]["spearman"] == pytest.approx(1)
    assert exact.metrics["ranking"]["overlap"] == 1
    assert exact.warnings == []
    said = []
    noisy = run(compared("hap.methods:hessian_trace", curvature="hutchinson", probes=2), 0, say=said.append)
    ranking = noisy.metrics["ranking"]
    assert -1 <= ranking["spearman"] < 0.95
    assert 0 <= ranking["overlap"] < 1
    assert ranking["groups"] == len(couple(task(0).model, trace(task(0).model, task(0).example), "union"))
    assert noisy.warnings == [f"the two halves of the probes agree on {ranking['agreement']:.0%} of what is pruned"]
    assert any(str(line) == f"warning: {noisy.warnings[0]}" for line in said)
    assert exact.metrics["dense"] == noisy.metrics["dense"]


def counted(model, loss, batches, groups, *, rng, pruned=None, ask: bool = False):
    """A score that counts its calls, and may ask what is pruned."""
    CALLS.append(ask)
    warnings.warn("this is a made-up warning", stacklevel=1)
    scores = torch.rand(len(groups), generator=rng)
    assert not ask or pruned(scores).dtype == torch.bool
    return scores


CALLS: list[bool] = []


def test_cases_that_differ_in_budget_share_their_scores_unless_the_score_asked_for_it():
    known = {}
    for ask, calls in ((False, 1), (True, 2)):
        CALLS.clear()
        case = replace_case(score=Ref(use=f"{__name__}:counted", options={"ask": ask}), finetune=None)
        budgets = [Budget(params=part, implant=0.2) for part in (0.3, 0.6)]
        one, two = (run(case.model_copy(update={"budget": budget}), 0, known=known) for budget in budgets)
        assert len(CALLS) == calls
        assert one.warnings == two.warnings == ["this is a made-up warning"]
        assert one.plan["rows"] != two.plan["rows"]
        assert (one.seconds["score"] == two.seconds["score"]) != ask
        CALLS.clear()
        run(case, 1, known=known)
        assert [ask] == CALLS  # another seed draws anew


def test_a_record_of_before_warnings_were_kept_reads(tmp_path):
    made = run(replace_case(finetune=None), 0)
    file = store.save(made, tmp_path)
    table = json.loads(file.read_text())
    assert table.pop("warnings") == []
    file.write_text(json.dumps(table))
    assert store.load(file).warnings == []


def test_a_score_that_is_the_same_for_all_correlates_with_nothing():
    made = run(changed(score=Ref(use=f"{__name__}:flat"), reference=CASE.score, finetune=None), 1)
    assert made.metrics["ranking"]["spearman"] == 0
    assert 0 <= made.metrics["ranking"]["overlap"] <= 1


def test_an_update_is_a_role_of_its_own_and_is_in_the_record(tmp_path):
    """In place of no fine-tuning at all: what is left is nearer to the dense network."""
    plain = changed(finetune=None)
    updated = changed(finetune=None, update=Ref(use="hap.updates:least_squares", options={"ridge": 0.01}))
    assert plain.key != updated.key
    one, other = (run(case, 0) for case in (plain, updated))
    assert other.config["update"] == {"use": "hap.updates:least_squares", "options": {"ridge": 0.01}}
    assert other.plan["rows"] == one.plan["rows"]
    assert other.metrics["one_shot"]["loss"] < one.metrics["one_shot"]["loss"]
    assert store.load(store.save(other, tmp_path)) == other


def test_what_an_update_adds_is_counted():
    task = load_task(CASE.task, 0, fit)
    groups = groups_of(task, CASE, Dense(CASE.task, 0, {}))
    small, chosen = one_shot(magnitude, None, least_squares)(task, groups, Budget(params=0.3), rng=generator(0))
    more = sum(chosen.added.values())
    assert params(small) == round((1 - chosen.removed["params"]) * params(task.model)) + more
    if more:
        assert chosen.to_json()["added"] == chosen.added
    with pytest.raises(HapError, match="the pruned model must be the one planned"):
        agree("made up", task, small, replace(chosen, added={"x": more + 1}))
