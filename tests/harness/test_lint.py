import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from fakes import SPEC, fake_run, write_spec
from typer.testing import CliRunner

from hap.harness import cli, report, store
from hap.harness.lint import lint
from hap.harness.spec import load_spec

ROOT = Path(__file__).parents[2]
RECORDS_GIVE = "it must be what the records give, which `hap report` writes"
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
    code = {**made.code, "commit": "a" * 40}
    return replace(made, metrics=metrics, epochs=epochs, plan={"removed": removed}, code=code)


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


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"code": {"commit": "a" * 40, "sha256": "0" * 63}}, f"code.sha256 must be 64 hex digits (found {'0' * 63})"),
        ({"code": {"commit": "a" * 40}}, "code.sha256 must be 64 hex digits (found None)"),
        ({"code": {"commit": "abc", "sha256": "0" * 64}}, "code.commit must be 40 hex digits, or null (found abc)"),
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
            "selected must be the test of the epoch that is best on the validation split (found {'accuracy': 94.6, *",
        ),
        ({"metrics": stages(last=1.0)}, "last must be the test of the last epoch (found {'accuracy': 1.0, *"),
        ({"metrics": stages(best_test_epoch=99.0)}, "best_test_epoch must be the best test of an epoch (found *"),
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
    assert any("results/VERDICTS.md" in line or "results/tables/table.csv" in line for line in lines)


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
    spoilt(folder, "random", cost=cost, plan={})
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
        ("md", "| `random` |", "| `gone` |", "a row must be there for case random (found none)"),
        ("md", "best on the validation", "best on the test", "the selection rule must be stated: "),
        ("md", "FLOPs would be twice as many", "and so on", "the convention for MACs must be stated: "),
        ("md", "94.10", "94.30", f"{RECORDS_GIVE} (found line 7: "),
        ("verdicts", "**HOLDS**", "**FAILS**", f"{RECORDS_GIVE} (found line "),
    ],
)
def test_a_table_that_is_not_what_the_records_give_is_found(folder, name, old, new, told):
    name = "VERDICTS.md" if name == "verdicts" else f"tables/table.{name}"
    edited(folder, name, old, new)
    assert any(line.startswith(f"results/{name}: {told}") for line in found(folder))


@pytest.mark.parametrize("name", ["tables/table.md", "tables/table.csv", "VERDICTS.md"])
def test_a_page_that_is_missing_is_found(folder, name):
    (folder / "results" / name).unlink()
    assert any(line.startswith(f"results/{name}: ") and line.endswith("(found none)") for line in found(folder))


def test_a_table_of_no_spec_is_found(folder):
    (folder / "results" / "tables" / "old.csv").write_text("case\n")
    assert found(folder) == ["results/tables/old.csv: a table must be of a spec (found old)"]


def test_a_spec_without_records_needs_no_table(tmp_path):
    write_spec(tmp_path)
    results = tmp_path / "results"
    report.summary(report.entries(tmp_path / "reproductions", results), results)
    assert found(tmp_path) == []


def test_the_command_tells_a_line_a_finding(folder, monkeypatch):
    monkeypatch.chdir(folder)
    told = CliRunner().invoke(cli.app, ["lint"])
    assert (told.exit_code, told.stdout) == (0, "nothing is wrong\n")
    edited(folder, "VERDICTS.md", "**HOLDS**", "**FAILS**")
    told = CliRunner().invoke(cli.app, ["lint"])
    assert told.exit_code == 1
    assert len(told.stdout.splitlines()) == 2
    assert told.stdout.endswith("1 findings\n")
    (folder / "reproductions" / "table.toml").write_text("title =")
    assert CliRunner().invoke(cli.app, ["lint"]).exit_code == 2


def test_nothing_is_wrong_with_the_committed_results():
    assert [finding.line for finding in lint(ROOT / "reproductions", ROOT / "results")] == []
