import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from fakes import SPEC, fake_run, write_spec
from typer.testing import CliRunner

from hap.harness.cli import app as cli
from hap.harness.cli.lint import lint
from hap.harness.records import checks as integrity
from hap.harness.records import store
from hap.harness.records.outcomes import STAGES, Said, packed
from hap.harness.report import write as report
from hap.harness.spec.spec import load_spec
from hap.harness.verdicts import families

ROOT = Path(__file__).parents[3]
ROWS = {"conv": "##--"}
BASE = '\n[[bases]]\ntask = "fakes:task"\naccuracy = 95\ntolerance = 0.1\nsource = "somebody\'s README"\n'


def honest(case, seed):
    """A made-up record whose parts agree."""
    made = fake_run(case, seed)
    last = made.metrics["selected"]
    epochs = [
        {"epoch": 0, "validation": {"accuracy": 90.0, "loss": 0.3}, "test": made.metrics["best_test_epoch"]},
        {"epoch": 1, "validation": {"accuracy": 91.0, "loss": 0.3}, "test": last},
    ]
    removed = {"params": 1 - 280 / 1000, "macs": 1 - 2000 / 5000, "groups": 0.5}
    metrics = {**made.metrics, "last": last}
    code = {**made.code, "commit": None}
    return replace(made, metrics=metrics, epochs=epochs, plan={"removed": removed, "rows": ROWS}, code=code)


@pytest.fixture
def folder(tmp_path):
    """A folder with one spec, its records and its report, of which nothing is wrong."""
    spec = load_spec(write_spec(tmp_path, SPEC + BASE))
    for case in spec.cases.values():
        for seed in spec.seeds:
            store.save(honest(case, seed), tmp_path / "results")
    written(tmp_path)
    return tmp_path


def written(folder):
    report.write([folder / "reproductions" / "table.toml"], folder / "results")


def found(folder):
    return [finding.line.replace(f"{folder}/", "") for finding in lint(folder / "reproductions", folder / "results")]


def spoilt(folder, case="hap", seed=1, *, report_too=True, **changes):
    """One record with other fields, its report written from it."""
    made = load_spec(folder / "reproductions" / "table.toml").cases[case]
    run = replace(honest(made, seed), **changes)
    file = store.path(folder / "results", made, seed)
    file.write_text(json.dumps(asdict(run), indent=1) + "\n")
    if report_too:
        written(folder)
    return str(file.relative_to(folder))


def stages(**accuracies):
    made = honest(load_case(), 1)
    return {**made.metrics, **{s: {"accuracy": a, "loss": 1 - a / 100} for s, a in accuracies.items()}}


def load_case():
    class Anything:
        spec, name, key, config = "table", "hap", "0", {}

    return Anything


def test_nothing_is_wrong_with_what_is_as_it_should_be(folder):
    assert found(folder) == []


COST = fake_run(load_case(), 1).cost
CODE = {"commit": "a" * 40, "dirty": False, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"code": {**CODE, "sha256": "0" * 63}}, f"code.sha256 must be 64 hex digits (found {'0' * 63})"),
        ({"code": {**CODE, "commit": "abc"}}, "code.commit must be 40 hex digits, or null (found abc)"),
        (
            {"plan": {"removed": {"params": 0.72, "macs": 0.61, "groups": 0.5}}},
            "plan.removed.macs must be 1 - 2000 / 5000 (found 0.61)",
        ),
        (
            {"plan": {"removed": {"params": 0.73, "macs": 0.6, "groups": 0.5}}},
            "plan.removed.params must be 1 - 280 / 1000 (found 0.73)",
        ),
        (
            {"cost": {**COST, "pruned": {**COST["pruned"], "macs": 6000}}, "plan": {}},
            "macs must be whole, and no more after pruning than before (found 5000, 6000)",
        ),
        (
            {"metrics": stages(selected=94.6)},
            "selected must be the test of the epoch that is best on the validation split, 1, by accuracy, *",
        ),
        ({"metrics": stages(last=1.0)}, "last must be the test of the last epoch (found {'accuracy': 1.0, *"),
        (
            {"metrics": stages(best_test_epoch=99.0)},
            "best_test_epoch must be the best test of an epoch, by accuracy (found *",
        ),
        ({"epochs": []}, "selected must be one_shot, for nothing was fine-tuned (found *"),
        ({"metrics": stages(dense=94.7)}, "the dense accuracy must be 95 ± 0.1, somebody's README (found 94.7)"),
        (
            {"metrics": stages(dense=95.05)},
            "the dense accuracy of seed 1 must be that of the other records, 95.05 (found 95.0)",
        ),
        (
            {"cost": {"dense": {**COST["dense"], "macs": 10000}, "pruned": {**COST["pruned"], "macs": 4000}}},
            "the MACs of the dense network, by one convention, must be that of the other records, 5000 (found 10000)",
        ),
        (
            {"data": {"name": "digits", "sha256": "2" * 64, "official": True, "note": ""}},
            f"the sha256 of the data must be that of the other records, {'1' * 64} (found {'2' * 64})",
        ),
        (
            {"config": {"spec": "table", "case": "hap", "task": {"use": "fakes:task", "options": {}}}},
            "its config must be that of its case (found another budget, coupling, finetune, implant, score, task)",
        ),
    ],
)
def test_what_is_wrong_with_a_record_is_found(folder, changes, told):
    file = spoilt(folder, **changes)
    lines = found(folder)
    head = told.partition("*")[0]
    assert [line for line in lines if head in line], lines
    if "other records" not in told:
        assert any(line.startswith(f"{file}: {head}") for line in lines)


ROW = {"validation": {"accuracy": 91.0, "loss": 0.3}, "test": {"accuracy": 94.1, "loss": 0.06}}
TIES = [ROW, {**ROW, "test": {"accuracy": 93.0, "loss": 0.07}}]


@pytest.mark.parametrize(
    ("second", "right", "epoch"),
    [
        ({"accuracy": 91.0, "loss": 0.3}, 0, "the earlier"),
        ({"accuracy": 91.0, "loss": 0.2}, 1, "that of lower loss"),
        ({"accuracy": 91.0, "loss": 0.4}, 0, "that of lower loss"),
    ],
)
def test_of_epochs_that_are_equal_one_is_selected(folder, second, right, epoch):
    epochs = [TIES[0], {**TIES[1], "validation": second}]
    tests = [each["test"] for each in epochs]
    for chosen in (0, 1):
        metrics = {
            **honest(load_case(), 1).metrics,
            "selected": tests[chosen],
            "last": tests[1],
            "best_test_epoch": tests[0],
        }
        spoilt(folder, epochs=epochs, metrics=metrics)
        lines = found(folder)
        assert bool(lines) == (chosen != right), (epoch, lines)
        assert all(f"best on the validation split, {right}, by accuracy" in line for line in lines)


def test_a_task_of_glue_selects_by_its_own_metric(folder):
    """Whatever the spec shows."""
    use = {"use": "hap.harness.tasks.glue_minilm:task", "options": {"data": "MRPC"}}
    run = honest(load_case(), 1)
    rows = [
        {**row, **{part: {**row[part], "f1": 90.0 - i} for part in ("validation", "test")}}
        for i, row in enumerate(TIES)
    ]
    assert [rule for rule, _ in integrity._selected(replace(run, epochs=rows), "f1")][-1].startswith("best_test_epoch")
    assert integrity._metric(replace(run, config={"task": use}), "accuracy") == "f1"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"plan": {}}, "plan.rows must be a line of '#', 'o' and '-' for each module (found None)"),
        ({"plan": {}}, "plan.removed.macs must be a share (found None)"),
        ({"plan": {"rows": ROWS, "removed": {"macs": 0.6}}}, "plan.removed.params must be a share (found None)"),
        (
            {"plan": {"rows": {"conv": "x"}}},
            "plan.rows must be a line of '#', 'o' and '-' for each module (found {'con",
        ),
    ],
)
def test_a_record_without_its_plan_is_found(folder, changes, told):
    assert f"{spoilt(folder, **changes)}: {told}" in " ".join(found(folder))


@pytest.mark.parametrize(
    "broken",
    [
        lambda table: table["epochs"][0].pop("test"),
        lambda table: table["epochs"][1]["validation"].pop("accuracy"),
        lambda table: table["cost"]["dense"].update(params=0),
        lambda table: table["cost"]["dense"].update(macs="5000"),
        lambda table: table["data"].pop("official"),
        lambda table: table["plan"].update(removed=[1]),
        lambda table: table["config"].pop("task"),
    ],
)
def test_a_broken_record_is_one_finding_and_hides_no_other(folder, broken):
    """Whoever finds it, the store or what is worked out from it."""
    other = spoilt(folder, seed=2, metrics=stages(dense=94.7))
    file = folder / spoilt(folder)
    table = json.loads(file.read_text())
    broken(table)
    file.write_text(json.dumps(table))
    lines = found(folder)
    mine = [line for line in lines if line.startswith(str(file.relative_to(folder)))]
    assert len(mine) == 1, lines
    assert "a record must " in mine[0]
    assert any(line.startswith(f"{other}: the dense accuracy must be 95") for line in lines)


@pytest.mark.parametrize("retimed", [False, True])
def test_a_copy_of_a_record_as_another_seed_is_found(folder, retimed):
    made = honest(load_spec(folder / "reproductions" / "table.toml").cases["hap"], 0)
    seconds = {name: value + retimed for name, value in made.seconds.items()}
    file = spoilt(folder, **{**vars(made), "seed": 1, "seconds": seconds})
    what = "epochs" if retimed else "seconds"
    assert found(folder) == [f"{file}: its {what} must be its own (found those of seed 0)"]


def test_two_specs_cannot_disagree_on_a_workload(folder):
    path = folder / "reproductions" / "other.toml"
    path.write_text((folder / "reproductions" / "table.toml").read_text())
    case, cost = load_spec(path).cases["hap"], {name: {**each, "macs": each["macs"] * 2} for name, each in COST.items()}
    store.save(replace(honest(case, 0), cost=cost), folder / "results")
    report.write([path], folder / "results")
    assert any("table/" in line and "by one convention, must be that of the other" in line for line in found(folder))


def test_a_metric_that_the_records_do_not_have_is_found(folder, monkeypatch):
    path = folder / "reproductions" / "table.toml"
    path.write_text(path.read_text().replace("seeds =", 'metric = "f1"\nseeds =', 1))
    told = "metric f1 must be in all of its records (found accuracy, loss in dense of hap seed 0)"
    assert found(folder) == [f"reproductions/table.toml: {told}"]
    monkeypatch.chdir(folder)
    shown = CliRunner().invoke(cli.app, ["report", "table"])
    assert (shown.exit_code, shown.stderr.splitlines()[-1]) == (2, f"hap: table.toml: {told}")


def test_a_key_that_is_not_of_its_config_is_found(folder):
    """The path, the record and the spec agree on it; only working it out again shows it."""
    file = spoilt(
        folder,
        config={
            **honest(load_spec(folder / "reproductions" / "table.toml").cases["hap"], 1).config,
            "coupling": "tied",
        },
    )
    assert any(line.startswith(f"{file}: its key must be that of its config, ") for line in found(folder))
    assert f"{file}: its config must be that of its case (found another coupling)" in found(folder)


def test_a_damaged_record_is_found_and_the_rest_goes_on(folder):
    file = spoilt(folder)
    (folder / file).write_text("{")
    lines = found(folder)
    assert any(
        line.startswith(f"{file}: a record must be whole, and where it belongs (found damaged") for line in lines
    )
    assert any(line.startswith("results/tables/table.csv: ") for line in lines)


def test_a_record_under_another_seed_or_key_is_found(folder):
    file = Path(spoilt(folder))
    (folder / file).rename(folder / file.parent / "seed7.json")
    other = folder / file.parent.parent / "hap-0123456789"
    other.mkdir()
    (folder / file.parent / "seed0.json").rename(other / "seed0.json")
    written(folder)
    rule = "a record must be of a spec, a case as it is now, and a seed"
    assert f"{file.parent}/seed7.json: {rule} (found {file.parent.name})" in found(folder)
    assert f"{file.parent.parent}/hap-0123456789/seed0.json: {rule} (found hap-0123456789)" in found(folder)


def test_budgets_that_differ_between_cases_that_are_compared_are_found(folder):
    file = folder / "reproductions" / "table.toml"
    other = 'like = "hap"\nbudget = {params = 0.6, implant = 0.1}\nfinetune = {epochs = 3, lr = 0.1}\n'
    file.write_text(file.read_text().replace('like = "hap"\n', other))
    lines, claim = found(folder), "reproductions/table.toml: claims[2]: "
    assert f"{claim}budgets of hap and random must be equal (found params 0.7 and 0.6)" in lines
    assert f"{claim}hap and random must have one workload and as many epochs (found epochs 2 and 3)" in lines


def test_sizes_that_differ_between_cases_that_are_compared_are_found(folder):
    cost = {**COST, "pruned": {**COST["pruned"], "params": 300}}
    removed = {"params": 1 - 300 / 1000, "macs": 1 - 2000 / 5000}
    spoilt(folder, "random", cost=cost, plan={"rows": ROWS, "removed": removed})
    assert found(folder) == [
        "reproductions/table.toml: claims[2]: hap and random must be pruned alike to 1 point "
        "(found 72 % and 70 % of the params, seed 1)"
    ]


def edited(folder, name, old, new):
    file = folder / "results" / name
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("csv", "94.1,", "94.3,", "selected_accuracy_mean of hap must be 94.1, as in its records (found 94.3)"),
        ("csv", "72,", "75,", "params_pruned_mean of hap must be 72, as in its records (found 75)"),
        ("csv", "72,", "x,", "params_pruned_mean of hap must be 72, as in its records (found x)"),
        ("csv", "random,", "gone,", "a row must be there for case random (found none)"),
        ("md", "| `random` ", "| `gone` ", "a row must be there for case `random` (found `gone`)"),
        ("tex", "random &", "gone &", "a row must be there for case random (found gone)"),
        ("md", "best on the validation", "best on the test", "the selection rule must be stated: "),
        ("md", "FLOPs would be twice as many", "and so on", "the convention for MACs must be stated: "),
        ("md", "94.10", "94.30", "selected_accuracy_mean of `hap` must be 94.1, as in its records (found 94.30)"),
        ("tex", "94.10", "94.30", "selected_accuracy_mean of hap must be 94.1, as in its records (found 94.30)"),
        ("tex", "\\midrule", "", "a row must be there for case hap (found none)"),
    ],
)
def test_a_table_that_is_not_what_the_records_give_is_found(folder, name, old, new, told):
    name = f"tables/table.{name}"
    edited(folder, name, old, new)
    assert any(line.startswith(f"results/{name}: {told}") for line in found(folder))


@pytest.mark.parametrize("name", ["tables/table.md", "tables/table.csv", "VERDICTS.md", "index.html"])
def test_a_page_that_is_missing_is_found(folder, name):
    (folder / "results" / name).unlink()
    assert any(line.startswith(f"results/{name}: ") and line.endswith("(found none)") for line in found(folder))


def test_a_table_of_no_spec_is_found(folder):
    (folder / "results" / "tables" / "old.csv").write_text("case\n")
    assert found(folder) == ["results/tables/old.csv: a table must be of a spec (found old)"]


def test_a_made_up_table_of_a_spec_without_records_is_found(folder):
    """One that `hap report` wrote is as it should be."""
    path, tables = folder / "reproductions" / "bare.toml", folder / "results" / "tables"
    path.write_text((folder / "reproductions" / "table.toml").read_text())
    report.write([path], folder / "results")
    assert found(folder) == []
    (tables / "bare.md").write_bytes((tables / "table.md").read_bytes())
    told = "results/tables/bare.md: selected_accuracy_mean of `hap` must be empty, as in its records (found 94.10)"
    assert told in found(folder)


@pytest.mark.parametrize("name", ["table.xlsx", "more/table.md", "table"])
def test_what_lies_beside_the_tables_is_found(folder, name):
    file = folder / "results" / "tables" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    assert [line.partition(": ")[0] for line in found(folder)] == [f"results/tables/{name}"]


@pytest.mark.parametrize("name", ["table.md", "table.csv", "table.tex"])
def test_a_table_that_is_no_text_is_found(folder, name):
    file = folder / "results" / "tables" / name
    file.write_bytes(file.read_bytes().replace(b"random", b"r\xffndom"))
    assert any(line.startswith(f"results/tables/{name}: a row must be there") for line in found(folder))


def test_a_table_without_its_head_is_found(folder):
    edited(folder, "tables/table.csv", "case,", "name,")
    assert "results/tables/table.csv: a row must be there for case hap (found none)" in found(folder)


@pytest.mark.parametrize("name", ["table.md", "table.csv", "table.tex"])
def test_a_folder_in_place_of_a_table_is_found(folder, name):
    (folder / "results" / "tables" / name).unlink()
    (folder / "results" / "tables" / name).mkdir()
    assert f"results/tables/{name}: a spec with records must have a table (found none)" in found(folder)


def test_a_spec_without_records_needs_no_table(tmp_path):
    write_spec(tmp_path)
    results = tmp_path / "results"
    report.summary(report.entries(tmp_path / "reproductions", results), results)
    report.page.write(report.entries(tmp_path / "reproductions", results), results)
    assert found(tmp_path) == []


def test_the_command_tells_a_line_a_finding(folder, monkeypatch):
    monkeypatch.chdir(folder)
    told = CliRunner().invoke(cli.app, ["lint"])
    assert (told.exit_code, told.stdout) == (0, "nothing is wrong\n")
    (folder / "results" / "VERDICTS.md").unlink()
    told = CliRunner().invoke(cli.app, ["lint"])
    assert told.exit_code == 1
    assert len(told.stdout.splitlines()) == 2
    assert told.stdout.endswith("1 findings\n")
    (folder / "reproductions" / "table.toml").write_text("title =")
    assert CliRunner().invoke(cli.app, ["lint"]).exit_code == 2


def test_nothing_is_wrong_with_the_committed_results():
    assert [finding.line for finding in lint(ROOT / "reproductions", ROOT / "results")] == []


def test_a_claim_that_no_seeds_decide_and_one_without_an_effect_are_told(folder):
    write_spec(folder, SPEC.replace("effect = 2\n", "").replace("tolerance = 0.5\n", "") + BASE)
    wrong = [line for line in found(folder) if "claims[" in line]
    assert wrong[0] == (
        "reproductions/table.toml: claims[1] must say the effect that it assumes, as in effect = 0.3 (found none)"
    )
    assert wrong[1].startswith("reproductions/table.toml: claims[2] must ")


def committed(folder, commit):
    """The commit of the evidence of hap."""
    made = honest(load_spec(folder / "reproductions" / "table.toml").cases["hap"], 0)
    for seed in range(3):
        spoilt(folder, seed=seed, code={**made.code, "commit": commit})


def test_families_that_changed_after_the_evidence_are_told_unless_there_is_a_reason(folder, monkeypatch):
    claims = load_spec(folder / "reproductions" / "table.toml").claims
    before = {families._same(claim): "sanity" for claim in claims}
    monkeypatch.setattr(families, "_families", lambda commit, path: before)
    committed(folder, "a" * 40)
    (line,) = [line for line in found(folder) if "family" in line]
    assert line == (
        "reproductions/table.toml: claims[1].family must be as when its evidence was made, sanity, or `regrouped` say "
        "why; evidence at aaaaaaaaaa (found sizes)"
    )
    write_spec(folder, SPEC.replace("[finetune]", 'regrouped = "sizes are no sanity"\n[finetune]') + BASE)
    assert not [line for line in found(folder) if "family" in line]


def test_what_git_does_not_know_of_families_is_said_and_is_no_finding(folder):
    committed(folder, "a" * 40)
    lines = []
    wrong = lint(folder / "reproductions", folder / "results", unknown=lines.append)
    assert not [each for each in wrong if "family" in each.rule]
    assert len(lines) == 1
    assert lines[0].endswith("how its claims were grouped is not known, for git does not have it at aaaaaaaaaa")


def test_bits_that_no_record_has_are_found(folder):
    case = load_spec(folder / "reproductions" / "table.toml").cases["hap"]
    right = Said(np.zeros(1000, int), np.zeros(1000, int))
    bits = packed(dict.fromkeys(STAGES, right), {"dense": {}})
    run = honest(case, 0)
    metrics = {stage: {**run.metrics[stage], "accuracy": 100.0} for stage in STAGES}
    store.save(replace(run, outcomes=bits, metrics={**run.metrics, **metrics}), folder / "results")
    assert not [line for line in found(folder) if "bits" in line]
    store.save(run, folder / "results")
    (line,) = found(folder)
    assert line.startswith("results/table/bits/")
    assert "bits must be of a record" in line
