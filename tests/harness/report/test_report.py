import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from fakes import REPORTED, SPEC, fake_run, unpadded, write_spec
from records import headed, ranked

from hap.harness.records import store
from hap.harness.report import page
from hap.harness.report import verdicts_md as summary
from hap.harness.report import write as report
from hap.harness.report.tables import frame, tables
from hap.harness.spec.spec import load_spec

HERE = Path(__file__).parents[1]
ROOT = HERE.parents[1]


@pytest.fixture
def saved(tmp_path, runs):
    for run in [*runs["hap"], *runs["random"]]:
        store.save(run, tmp_path / "results")
    return tmp_path / "results"


def summed(specs, results):
    """VERDICTS.md of a folder."""
    return summary.summary(report.entries(specs, results), results)


def test_a_row_a_case_with_mean_and_deviation(spec, runs):
    table = frame(spec, runs)
    assert list(table["case"]) == ["hap", "random"]
    assert list(table["seeds"]) == [3, 1]
    hap = table.iloc[0]
    assert (hap["selected_accuracy_mean"], hap["selected_accuracy_sd"]) == (94.0, 1.0)
    assert (hap["one_shot_accuracy_mean"], hap["dense_accuracy_mean"]) == (61.0, 95.0)
    assert hap["params_pruned_mean"] == pytest.approx(72.0)
    assert hap["macs_pruned_mean"] == pytest.approx(60.0)
    assert (hap["score_seconds_mean"], hap["score_seconds_sd"]) == (3.0, 1.0)
    assert pd.isna(table.iloc[1]["selected_accuracy_sd"])


def test_the_table_says_what_it_shows(spec, runs, tmp_path):
    csv, markdown, _ = tables(spec, runs, tmp_path)
    assert (csv, markdown) == (tmp_path / "tables" / "table.csv", tmp_path / "tables" / "table.md")
    assert list(pd.read_csv(csv)["seeds_wanted"]) == [3, 3]
    text = unpadded(markdown.read_text())
    assert "| `hap` | 3 | 95.00 | 61.00 ± 1.00 | 94.00 ± 1.00 | 94.60 ± 0.10 | 72.00 | 60.00 | 3.00 ± 1.00 |" in text
    assert "| `random` | 1 of 3 | 95.00 | 60.00 | 94.00 | 94.50 | 72.00 | 60.00 | 2.00 |" in text
    assert "best test epoch (%), optimistic" in text
    assert "FLOPs would be twice as many" in text
    assert "Data: digits (official), sha256 1111111111111111." in text
    assert "UNOFFICIAL" not in text


def test_what_others_reported_stands_below_and_is_named_so(tmp_path, runs):
    spec = load_spec(write_spec(tmp_path, SPEC + REPORTED))
    csv, markdown, _ = tables(spec, runs, tmp_path)
    table = pd.read_csv(csv)
    assert list(table["case"]) == ["hap", "random", "reported by GReg-1", "reported by HRank"]
    assert list(table["origin"]) == ["run here", "run here", "reported", "reported"]
    assert list(table["published_accuracy_mean"].dropna()) == [93.2, 93.17]
    assert table["selected_accuracy_mean"].isna().tolist() == [False, False, True, True]
    assert table["source"].dropna().tolist() == ["arXiv 2012.09243, table 1", "made up <for a test>"]
    text = unpadded(markdown.read_text())
    ours, greg, hrank = (
        text.index(name) for name in ("| `random` |", "| reported by GReg-1 (1) |", "| reported by HRank")
    )
    assert ours < greg < hrank
    assert "best test epoch (%), optimistic | as published (%) | params pruned (%)" in text
    assert "| `hap` | 3 | 95.00 | 61.00 ± 1.00 | 94.00 ± 1.00 | 94.60 ± 0.10 | - | 72.00 | 60.00 |" in text
    assert "| reported by GReg-1 (1) | - | 93.36 | - | - | - | 93.2 | 49.82 | 50 | - |" in text
    assert "| reported by HRank (2) | - | 93.26 | - | - | - | 93.17 | - | - | - |" in text
    assert "\n(1) GReg-1: ResNet56, CIFAR-10. arXiv 2012.09243, table 1. 3 runs \\| mean\n" in text
    assert "\n(2) HRank: ResNet56, CIFAR-10. made up &lt;for a test>\n" in text
    assert "They were not run here and are not judged" in text


def test_what_others_reported_is_not_judged_and_leaves_other_tables_alone(tmp_path, spec, runs, saved):
    plain = [file.read_text() for file in tables(spec, runs, tmp_path / "a")]
    verdicts = summed(tmp_path / "reproductions", saved).read_text()
    assert "published" not in plain[0] + plain[1].replace("what the published code", "")
    assert "origin" not in plain[0]
    write_spec(tmp_path, SPEC + REPORTED)
    assert summed(tmp_path / "reproductions", saved).read_text() == verdicts


def test_an_unofficial_copy_is_called_one(spec, runs, tmp_path):
    copy = {"name": "cifar10", "sha256": "2" * 64, "official": False, "note": "from a mirror | see below"}
    changed = {"hap": [fake_run(spec.cases["hap"], 0, data=copy)]}
    csv, markdown, _ = tables(spec, changed, tmp_path)
    assert "cifar10 (UNOFFICIAL copy), sha256 2222222222222222. from a mirror" in markdown.read_text()
    assert "UNOFFICIAL" in csv.read_text()


def test_a_case_without_evidence_keeps_its_row(spec, tmp_path):
    _, markdown, _ = tables(spec, {}, tmp_path)
    assert "| `hap` | 0 of 3 | - | - | - | - | - | - | - |" in unpadded(markdown.read_text())


def test_verdicts_tell_claim_source_observation_and_seeds(tmp_path, saved):
    file = summed(tmp_path / "reproductions", saved)
    text = unpadded(file.read_text())
    assert file == saved / "VERDICTS.md"
    assert (
        "| 1 | **HOLDS** | more than 70 % of the parameters go | params_pruned of hap >= 70 "
        "| 72 (72 to 72; exact) | 3 |  |\n"
        "| 2 | **ABSENT** | hap is no worse than random | accuracy selected of hap - random >= 0 ± 0.5 | - | 0 | "
        "no evidence for seed 1, 2 |"
    ) in text
    assert "\n- Source of claim 1: [Yu22] abstract\n- Source of claim 2: the suite\n" in text
    assert "| [A made-up table](#a-made-up-table) | 1 |  |  | 1 |  |" in text
    assert "| all | **1** | **0** | **0** | **1** | **0** |\n" in text


def test_evidence_of_other_code_is_stale_on_the_pages_which_tell_what_it_says(tmp_path, runs):
    for run in runs["hap"]:
        store.save(replace(run, code={**run.code, "decides": "0" * 64}), tmp_path / "results")
    (entry,) = report.entries(tmp_path / "reproductions", tmp_path / "results")
    text = unpadded(summary.summary([entry], tmp_path / "results").read_text())
    assert "| 1 | **STALE** | more than 70 % of the parameters go |" in text
    assert "| 3 | the evidence says HOLDS |" in text
    assert "| all | **0** | **0** | **0** | **1** | **1** |\n" in text
    assert "the evidence says HOLDS" in page.write([entry], tmp_path / "results").read_text()


def test_the_pages_name_the_commits_of_the_records(tmp_path, runs):
    older, *others = runs["hap"]
    older = replace(older, code={**older.code, "commit": "0123456789abcdef"}, created="2020-01-01T00:00:00")
    changed = replace(runs["random"][0], code={"commit": None, "dirty": True, "sha256": "0" * 64})
    for run in (older, *others, changed):
        store.save(run, tmp_path / "results")
    (entry,) = report.entries(tmp_path / "reproductions", tmp_path / "results")
    told = "2 at abc, 1 at unknown with changes, 1 at 0123456789"
    assert sorted(summary.commits(entry).split(", ")) == sorted(told.split(", "))
    assert summary.commits(entry).endswith("1 at 0123456789")  # the latest come first
    text = unpadded(summary.summary([entry], tmp_path / "results").read_text())
    assert f" Records: {summary.commits(entry)}." in text
    assert "| spec | HOLDS | FAILS | UNDECIDED | ABSENT | STALE |" in text
    assert f"4 of 6 records, {summary.commits(entry)}." in page.write([entry], tmp_path / "results").read_text()


def test_text_of_a_spec_cannot_break_the_page(tmp_path):
    write_spec(tmp_path, SPEC.replace("more than 70 %", "<b>more|than</b> 70 %"))
    text = unpadded(summed(tmp_path / "reproductions", tmp_path / "results").read_text())
    assert "&lt;b>more\\|than&lt;/b> 70 %" in text


def test_what_is_known_is_told_with_the_verdict(tmp_path, saved):
    write_spec(tmp_path, SPEC.replace("value = 70", 'value = 80\nknown = "a made-up world"'))
    text = unpadded(summed(tmp_path / "reproductions", saved).read_text())
    assert "| **FAILS** | more than 70 % of the parameters go |" in text
    assert "| 3 | known: a made-up world |" in text


def test_a_spec_that_does_not_read_does_not_hide_the_others(tmp_path, saved):
    write_spec(tmp_path, "x = 1", name="broken")
    text = unpadded(summed(tmp_path / "reproductions", saved).read_text())
    assert "## broken\n\nNot judged. broken.toml: title: is required" in text
    assert "**HOLDS**" in text


WRITES = """
import sys
from pathlib import Path
from hap.harness.report import write as report
report.write([Path(sys.argv[1])], Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_equal_evidence_gives_equal_bytes_in_two_processes(tmp_path, saved):
    """Two interpreters with other hashes and another matplotlibrc, which has no say."""
    shutil.copytree(ROOT / "paper_figs", tmp_path / "paper_figs")
    spec = tmp_path / "reproductions" / "table.toml"
    told = []
    first = {file: file.read_bytes() for file in report.write([spec], saved, told.append)}
    assert told == list(first)
    (tmp_path / "matplotlibrc").write_text("font.size: 20\nlines.linewidth: 9\n")
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", WRITES, str(spec), str(saved)]
    for file in first:
        file.unlink()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in first if file.read_bytes() != first[file]] == []
    assert sorted(str(file.relative_to(saved)) for file in first) == [
        "VERDICTS.md",
        "figures/table-accuracy_vs_macs.pdf",
        "figures/table-accuracy_vs_macs.png",
        "figures/table-accuracy_vs_params.pdf",
        "figures/table-accuracy_vs_params.png",
        "figures/table-cost_of_scoring.pdf",
        "figures/table-cost_of_scoring.png",
        "figures/table-latency_vs_macs.pdf",
        "figures/table-latency_vs_macs.png",
        "index.html",
        "tables/table.csv",
        "tables/table.md",
        "tables/table.tex",
    ]
    assert first[saved / "figures" / "table-accuracy_vs_params.png"].startswith(b"\x89PNG")
    assert b"CreationDate" not in first[saved / "figures" / "table-accuracy_vs_params.pdf"]
    assert not [file.name for file in first if b"matplotlib" in file.read_bytes() and file.suffix in (".png", ".pdf")]


def test_a_method_has_no_score_and_tells_how_long_it_took_to_prune(spec, tmp_path):
    runs = {"hap": [fake_run(spec.cases["hap"], 0, seconds={"prune": 7.0})], "random": []}
    assert frame(spec, runs).iloc[0]["score_seconds_mean"] == 7.0


def test_the_table_of_a_spec_with_a_reference_tells_the_ranking(tmp_path):
    spec, runs = ranked(tmp_path)
    _, markdown, _ = tables(spec, runs, tmp_path)
    text = unpadded(markdown.read_text())
    assert "| rank correlation | overlap of the pruned | negative scores |" in text
    assert "| 0.20 | 0.27 | 7.00 |" in text
    assert "*Rank correlation* (Spearman)" in text


def test_cases_with_and_without_a_reference_share_a_table(tmp_path):
    text = SPEC.replace("[cases.random]", '[cases.random]\nreference = "fakes:score"')
    spec = load_spec(write_spec(tmp_path, text))
    made = {name: [fake_run(case, seed) for seed in spec.seeds] for name, case in spec.cases.items()}
    ranking = {"spearman": 0.5, "overlap": 0.7, "negative": 7.0}
    made["random"] = [replace(run, metrics={**run.metrics, "ranking": ranking}) for run in made["random"]]
    _, markdown, _ = tables(spec, made, tmp_path)
    lines = unpadded(markdown.read_text()).splitlines()
    assert next(line for line in lines if "`hap`" in line).endswith("| 3.00 ± 1.00 | - | - | - |")
    assert next(line for line in lines if "`random`" in line).endswith("| 3.00 ± 1.00 | 0.50 | 0.70 | 7.00 |")


def test_the_table_of_heads_shows_their_share_and_the_metric_of_the_spec(tmp_path):
    spec, runs = headed(tmp_path)
    csv, markdown, _ = tables(spec, runs, tmp_path)
    table = pd.read_csv(csv)
    assert list(table["heads_pruned_mean"]) == [25.0, 50.0, 25.0, 50.0, 50.0]
    assert list(table["selected_f1_mean"]) == [80.5, 81.5, 82.5, 83.5, 84.5]
    assert "selected_accuracy_mean" not in table
    assert "Test F1 of class 1, mean ± standard deviation" in markdown.read_text()
