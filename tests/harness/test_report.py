import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from fakes import REPORTED, SPEC, fake_run, with_accuracy, write_spec

from hap.harness import report, store
from hap.harness.spec import load_spec

ROOT = Path(__file__).parents[2]


@pytest.fixture
def spec(tmp_path):
    return load_spec(write_spec(tmp_path))


@pytest.fixture
def runs(spec):
    """Three seeds of hap, one of random."""
    hap = [with_accuracy(fake_run(spec.cases["hap"], seed), "selected", 93.0 + seed) for seed in spec.seeds]
    return {"hap": hap, "random": [fake_run(spec.cases["random"], 0)]}


@pytest.fixture
def saved(tmp_path, runs):
    for run in [*runs["hap"], *runs["random"]]:
        store.save(run, tmp_path / "results")
    return tmp_path / "results"


def test_a_row_a_case_with_mean_and_deviation(spec, runs):
    table = report.frame(spec, runs)
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
    csv, markdown = report.tables(spec, runs, tmp_path)
    assert (csv, markdown) == (tmp_path / "tables" / "table.csv", tmp_path / "tables" / "table.md")
    assert list(pd.read_csv(csv)["seeds_wanted"]) == [3, 3]
    text = markdown.read_text()
    assert "| `hap` | 3 | 95.00 | 61.00 ± 1.00 | 94.00 ± 1.00 | 94.60 ± 0.10 | 72.00 | 60.00 | 3.00 ± 1.00 |" in text
    assert "| `random` | 1 of 3 | 95.00 | 60.00 | 94.00 | 94.50 | 72.00 | 60.00 | 2.00 |" in text
    assert "best test epoch (%), optimistic" in text
    assert "FLOPs would be twice as many" in text
    assert "Data: digits (official), sha256 1111111111111111." in text
    assert "UNOFFICIAL" not in text


def test_what_others_reported_stands_below_and_is_named_so(tmp_path, runs):
    spec = load_spec(write_spec(tmp_path, SPEC + REPORTED))
    csv, markdown = report.tables(spec, runs, tmp_path)
    table = pd.read_csv(csv)
    assert list(table["case"]) == ["hap", "random", "reported by GReg-1", "reported by HRank"]
    assert list(table["origin"]) == ["run here", "run here", "reported", "reported"]
    assert list(table["published_accuracy_mean"].dropna()) == [93.2, 93.17]
    assert table["selected_accuracy_mean"].isna().tolist() == [False, False, True, True]
    assert table["source"].dropna().tolist() == ["arXiv 2012.09243, table 1", "made up <for a test>"]
    text = markdown.read_text()
    ours, greg, hrank = (
        text.index(name) for name in ("| `random` |", "| reported by GReg-1 (1) |", "| reported by HRank")
    )
    assert ours < greg < hrank
    assert "best test epoch (%), optimistic | as published (%) | params pruned (%)" in text
    assert "| `hap` | 3 | 95.00 | 61.00 ± 1.00 | 94.00 ± 1.00 | 94.60 ± 0.10 | - | 72.00 | 60.00 |" in text
    assert "| reported by GReg-1 (1) | - | 93.36 | - | - | - | 93.2 | 49.82 | 50 | - |" in text
    assert "| reported by HRank (2) | - | 93.26 | - | - | - | 93.17 | - | - | - |" in text
    assert "\n1. GReg-1: ResNet56, CIFAR-10. arXiv 2012.09243, table 1. 3 runs \\| mean\n" in text
    assert "\n2. HRank: ResNet56, CIFAR-10. made up &lt;for a test>\n" in text
    assert "They were not run here and are not judged" in text


def test_what_others_reported_is_not_judged_and_leaves_other_tables_alone(tmp_path, spec, runs, saved):
    plain = [file.read_text() for file in report.tables(spec, runs, tmp_path / "a")]
    verdicts = report.summary(tmp_path / "reproductions", saved).read_text()
    assert "published" not in plain[0] + plain[1].replace("what the published code", "")
    assert "origin" not in plain[0]
    write_spec(tmp_path, SPEC + REPORTED)
    assert report.summary(tmp_path / "reproductions", saved).read_text() == verdicts


def test_an_unofficial_copy_is_called_one(spec, runs, tmp_path):
    copy = {"name": "cifar10", "sha256": "2" * 64, "official": False, "note": "from a mirror | see below"}
    changed = {"hap": [fake_run(spec.cases["hap"], 0, data=copy)]}
    csv, markdown = report.tables(spec, changed, tmp_path)
    assert "cifar10 (UNOFFICIAL copy), sha256 2222222222222222. from a mirror" in markdown.read_text()
    assert "UNOFFICIAL" in csv.read_text()


def test_a_case_without_evidence_keeps_its_row(spec, tmp_path):
    _, markdown = report.tables(spec, {}, tmp_path)
    assert "| `hap` | 0 of 3 | - | - | - | - | - | - | - |" in markdown.read_text()


def test_verdicts_tell_claim_source_observation_and_seeds(tmp_path, saved):
    file = report.summary(tmp_path / "reproductions", saved)
    text = file.read_text()
    assert file == saved / "VERDICTS.md"
    assert (
        "| 1 | more than 70 % of the parameters go | [Yu22] abstract | params_pruned of hap >= 70 "
        "| 72 (72 to 72; exact) | **HOLDS** | 3 |"
    ) in text
    assert "| **ABSENT**: no evidence for seed 1, 2 | 0 |" in text


def test_text_of_a_spec_cannot_break_the_page(tmp_path):
    write_spec(tmp_path, SPEC.replace("more than 70 %", "<b>more|than</b> 70 %"))
    text = report.summary(tmp_path / "reproductions", tmp_path / "results").read_text()
    assert "&lt;b>more\\|than&lt;/b> 70 %" in text


def test_what_is_known_is_told_with_the_verdict(tmp_path, saved):
    write_spec(tmp_path, SPEC.replace("value = 70", 'value = 80\nknown = "a made-up world"'))
    text = report.summary(tmp_path / "reproductions", saved).read_text()
    assert "**FAILS** (known: a made-up world)" in text


def test_a_spec_that_does_not_read_does_not_hide_the_others(tmp_path, saved):
    write_spec(tmp_path, "x = 1", name="broken")
    text = report.summary(tmp_path / "reproductions", saved).read_text()
    assert "## broken\n\nNot judged. broken.toml: title: is required" in text
    assert "**HOLDS**" in text


def test_equal_evidence_gives_equal_bytes(tmp_path, saved):
    shutil.copytree(ROOT / "paper_figs", tmp_path / "paper_figs")
    spec = tmp_path / "reproductions" / "table.toml"
    first = {file: file.read_bytes() for file in report.write([spec], saved)}
    second = {file: file.read_bytes() for file in report.write([spec], saved)}
    assert first == second
    assert sorted(str(file.relative_to(saved)) for file in first) == [
        "VERDICTS.md",
        "figures/table-accuracy_vs_params.pdf",
        "figures/table-accuracy_vs_params.png",
        "tables/table.csv",
        "tables/table.md",
    ]
    assert first[saved / "figures" / "table-accuracy_vs_params.png"].startswith(b"\x89PNG")
    assert b"CreationDate" not in first[saved / "figures" / "table-accuracy_vs_params.pdf"]


def test_no_figure_without_records_or_without_scripts(spec, runs, tmp_path):
    assert report.figures(spec, {}, tmp_path, ROOT) == []
    assert report.figures(spec, runs, tmp_path, tmp_path) == []


def figure(monkeypatch, spec, runs, tmp_path):
    """The figure, caught before it becomes a file."""
    from paper_figs import accuracy_vs_params, style

    caught = []
    monkeypatch.setattr(style, "save", lambda made, stem: caught.append(made) or [])
    accuracy_vs_params.draw(spec, runs, tmp_path)
    return caught[0]


def panels(monkeypatch, spec, runs, tmp_path):
    """What the figure draws."""
    return figure(monkeypatch, spec, runs, tmp_path).axes


@pytest.fixture
def importable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


@pytest.mark.usefixtures("importable")
def test_a_line_a_method_with_bars_from_smallest_to_largest(tmp_path, monkeypatch):
    spec = load_spec(write_spec(tmp_path, SPEC.split("[[claims]]")[0].replace("params = 0.7", "params = [0.3, 0.7]")))
    runs = {}
    for case in spec.cases.values():
        cost = fake_run(case, 0).cost
        cost = cost | {"pruned": cost["pruned"] | {"params": round(1000 * (1 - case.budget.params))}}
        made = [fake_run(case, seed, cost=cost) for seed in spec.seeds]
        runs[case.name] = [with_accuracy(run, "selected", 90.0 + 3 * run.seed**2) for run in made]
    axes = panels(monkeypatch, spec, runs, tmp_path)
    assert [axis.get_title(loc="left") for axis in axes] == ["one-shot", "after fine-tuning"]
    bars = axes[1].containers
    assert [bar.get_label() for bar in bars] == ["hap", "random"]
    assert list(bars[0].lines[0].get_ydata()) == [95.0, 95.0]
    assert [segment[:, 1].tolist() for segment in bars[0].lines[2][0].get_segments()] == [[90.0, 102.0]] * 2
    assert list(bars[0].lines[0].get_xdata()) == pytest.approx([30.0, 70.0], abs=1.0)
    assert axes[1].lines[0].get_label() == "dense, 95.00 %"
    assert axes[1].get_xlabel() == "parameters left (%)"


@pytest.mark.usefixtures("importable")
def test_one_budget_without_fine_tuning_is_one_panel(tmp_path, monkeypatch):
    text = SPEC.replace("[finetune]\nepochs = 2\nlr = 0.1", "finetune = false")
    spec = load_spec(write_spec(tmp_path, text))
    runs = {name: [fake_run(case, 0)] for name, case in spec.cases.items()}
    (axis,) = panels(monkeypatch, spec, runs, tmp_path)
    assert axis.get_xlabel() == "one budget: 28 % of the parameters left"


def test_a_method_has_no_score_and_tells_how_long_it_took_to_prune(spec, tmp_path):
    runs = {"hap": [fake_run(spec.cases["hap"], 0, seconds={"prune": 7.0})], "random": []}
    assert report.frame(spec, runs).iloc[0]["score_seconds_mean"] == 7.0


def ranked(tmp_path):
    """A spec of scores compared with a reference, and records of all its cases."""
    cases = "".join(
        f"""
[cases.{name}]
like = "hap"
score = {{use = "hap.methods:hessian_trace", curvature = "hutchinson", {options}}}
budget = {{params = {budget}, implant = 0.1}}
"""
        for name, options, budget in (("few", "probes = 3", "[0.3, 0.7]"), ("many", "probes = 30", "0.7"),
                                      ("block", "probes = 3, block = true", "0.7"))
    )  # fmt: skip
    text = SPEC.replace("[finetune]", 'reference = "fakes:score"\n\n[finetune]').replace(
        "[[claims]]", cases + "\n[[claims]]", 1
    )
    spec = load_spec(write_spec(tmp_path, text, "ranked"))
    runs = {}
    for place, (name, made) in enumerate(spec.cases.items()):
        each = [fake_run(made, seed) for seed in range(3)]
        ranking = {"spearman": 0.1 * place, "overlap": 0.25 + 0.01 * place, "negative": 7.0}
        runs[name] = [replace(r, metrics={**r.metrics, "ranking": ranking}) for r in each]
    return spec, runs


def test_the_table_of_a_spec_with_a_reference_tells_the_ranking(tmp_path):
    spec, runs = ranked(tmp_path)
    _, markdown = report.tables(spec, runs, tmp_path)
    text = markdown.read_text()
    assert "| rank correlation | overlap of the pruned | negative scores |" in text
    assert "| 0.20 | 0.27 | 7.00 |" in text
    assert "*Rank correlation* (Spearman)" in text


@pytest.mark.usefixtures("importable")
def test_rankings_have_figures_of_their_own(tmp_path, monkeypatch):
    from paper_figs import accuracy_vs_params, probes, style

    spec, runs = ranked(tmp_path)
    caught = []
    monkeypatch.setattr(style, "save", lambda made, stem: caught.append((stem.name, made.axes)) or [stem])
    assert accuracy_vs_params.draw(spec, runs, tmp_path) == []
    assert len(probes.draw(spec, runs, tmp_path)) == 2
    (name, (spearman, overlap)), (other, panels) = caught
    assert (name, other) == ("ranked-ranking", "ranked-accuracy")
    (line,) = spearman.get_lines()[:1]
    assert list(line.get_xdata()) == [3, 30]
    assert list(line.get_ydata()) == pytest.approx([0.3, 0.4])
    assert overlap.get_lines()[0].get_ydata()[0] == pytest.approx(0.28)
    assert len(panels) == 1
    assert list(panels[0].get_lines()[0].get_ydata()) == pytest.approx([61, 61])
    assert probes.draw(spec, {}, tmp_path) == []


def test_cases_with_and_without_a_reference_share_a_table(tmp_path):
    text = SPEC.replace("[cases.random]", '[cases.random]\nreference = "fakes:score"')
    spec = load_spec(write_spec(tmp_path, text))
    made = {name: [fake_run(case, seed) for seed in spec.seeds] for name, case in spec.cases.items()}
    ranking = {"spearman": 0.5, "overlap": 0.7, "negative": 7.0}
    made["random"] = [replace(run, metrics={**run.metrics, "ranking": ranking}) for run in made["random"]]
    _, markdown = report.tables(spec, made, tmp_path)
    lines = markdown.read_text().splitlines()
    assert next(line for line in lines if "`hap`" in line).endswith("| 3.00 ± 1.00 | - | - | - |")
    assert next(line for line in lines if "`random`" in line).endswith("| 3.00 ± 1.00 | 0.50 | 0.70 | 7.00 |")


@pytest.mark.usefixtures("importable")
def test_more_methods_than_colours_are_drawn_in_parts_of_one_scale(tmp_path, monkeypatch):
    heirs = "".join(f'[cases.m{n}]\nlike = "hap"\nscore = {{use = "fakes:score", probes = {n}}}\n' for n in range(1, 8))
    text = SPEC.split("[[claims]]")[0].replace("params = 0.7", "params = [0.3, 0.7]")
    spec = load_spec(write_spec(tmp_path, text + heirs))
    runs = {}
    for number, (name, case) in enumerate(spec.cases.items()):
        cost = fake_run(case, 0).cost
        cost = cost | {"pruned": cost["pruned"] | {"params": round(1000 * (1 - case.budget.params))}}
        runs[name] = [with_accuracy(fake_run(case, 0, cost=cost), "selected", 50.0 + number)]
    runs["m7@70"].append(with_accuracy(runs["m7@70"][0], "selected", 3.0))  # a bar that only its own part draws
    first, second = (part.axes for part in figure(monkeypatch, spec, runs, tmp_path).subfigs)
    assert [axis.get_title(loc="left") for axis in (*first, *second)] == ["one-shot", "after fine-tuning"] * 2
    drawn = [[bar.get_label() for bar in axes[1].containers] for axes in (first, second)]
    assert drawn == [["hap", "random", "m1", "m2"], ["m3", "m4", "m5", "m6", "m7"]]
    assert first[1].get_ylim() == second[1].get_ylim()
    assert first[0].get_ylim() != first[1].get_ylim()
    colours = [bar.lines[0].get_color() for bar in second[1].containers]
    assert len(set(colours)) == 5
    grey = [line for line in second[1].get_lines() if line.get_color() == "#cccccc"]
    assert [list(line.get_ydata()) for line in grey] == [[51.0, 50.0], [53.0, 52.0], [55.0, 54.0], [57.0, 56.0]]


HEADS = """
title = "Heads"
paper = "[Yu22]"
tier = "quick"
seeds = [0, 1]
metric = "f1"
task = "fakes:task"
reference = "fakes:score"

[finetune]
epochs = 2
lr = 0.1

[cases.hap]
score = "fakes:score"
prune = "heads"
budget = {prunable = [0.25, 0.5]}

[cases.random]
like = "hap"
score = "fakes:random"

[cases.implants]
like = "hap"
implant = "fakes:implant"
budget = {prunable = [0.5], implant = 0.5, rank = 1}
"""
# two layers of four heads of two rows each, and the layer behind them
PLANS = {
    "hap@25": ["##--####", "####--##"],
    "hap@50": ["##----##", "####----"],
    "random@25": ["--######", "--######"],
    "random@50": ["--##--##", "--##--##"],
    "implants@50": ["##--oo##", "####--oo"],
}


@pytest.fixture
def headed(tmp_path):
    """A spec that prunes heads, and records of all its cases, of which the second seed's first layer keeps all."""
    spec = load_spec(write_spec(tmp_path, HEADS, "headed"))
    runs = {}
    for place, (name, layers) in enumerate(PLANS.items()):
        runs[name] = []
        for seed in spec.seeds:
            rows = {}
            for number, line in enumerate(layers):
                line = "#" * 8 if seed and not number else line
                rows |= {f"{number}.self.{part}": line for part in ("query", "key", "value")}
                rows[f"{number}.output"] = "#" * 6
            made = fake_run(
                spec.cases[name], seed, plan={"rows": rows, "removed": {"groups": 0.25 + 0.25 * ("50" in name)}}
            )
            stages = {stage: {**found, "f1": 80.0 + place + seed} for stage, found in made.metrics.items()}
            ranking = {"spearman": 0.1 * place, "overlap": 0.5, "negative": 0.0}
            runs[name].append(replace(made, metrics={**stages, "ranking": ranking}))
    return spec, runs


def test_the_table_of_heads_shows_their_share_and_the_metric_of_the_spec(headed, tmp_path):
    spec, runs = headed
    csv, markdown = report.tables(spec, runs, tmp_path)
    table = pd.read_csv(csv)
    assert list(table["heads_pruned_mean"]) == [25.0, 50.0, 25.0, 50.0, 50.0]
    assert list(table["selected_f1_mean"]) == [80.5, 81.5, 82.5, 83.5, 84.5]
    assert "selected_accuracy_mean" not in table
    assert "Test F1 of class 1, mean ± standard deviation" in markdown.read_text()


@pytest.mark.usefixtures("importable")
def test_heads_have_figures_of_their_own(headed, tmp_path, monkeypatch):
    from paper_figs import accuracy_vs_params, heads, probes, style

    spec, runs = headed
    caught = {}
    monkeypatch.setattr(style, "save", lambda made, stem: caught.setdefault(stem.name, made) and [stem])
    assert accuracy_vs_params.draw(spec, runs, tmp_path) == probes.draw(spec, runs, tmp_path) == []
    assert len(heads.draw(spec, runs, tmp_path)) == 3
    lines = caught["headed-heads"].axes[1]
    assert lines.get_legend_handles_labels()[1] == ["dense, 82.0 %", "hap", "random"]  # one point is no line
    assert lines.get_ylabel() == "F1 (%)"
    assert [list(line.get_ydata()) for line in lines.get_lines() if len(line.get_xdata()) == 2][1] == [81.5, 80.5]
    kept = {
        axis.get_title(loc="left"): axis.get_images()[0].get_array() for axis in caught["headed-heads-kept"].axes[:3]
    }
    assert kept["hap"].tolist() == [[1, 0.5, 0.5, 1], [1, 1, 0, 0]]
    assert kept["random"].tolist() == [[0.5, 1, 0.5, 1], [0, 1, 0, 1]]
    assert kept["implants"].tolist() == [[1, 0.5, 0.75, 1], [1, 1, 0, 0.5]]
    labels = [label.get_text() for label in caught["headed-heads-ranking"].axes[0].get_yticklabels()]
    assert labels == ["hap", "random"]  # the implants have hap's score
    assert heads.draw(spec, {}, tmp_path) == []


@pytest.mark.usefixtures("importable")
def test_a_spec_without_heads_has_no_figure_of_them(spec, runs, tmp_path):
    from paper_figs import heads

    assert heads.draw(spec, runs, tmp_path) == []


def planned(spec, plans, **more):
    """Records of each case with these plans, a seed each: case -> list of {module: rows}."""
    return {
        name: [fake_run(spec.cases[name], seed, plan={"rows": rows}, **more) for seed, rows in enumerate(each)]
        for name, each in plans.items()
    }


def layers(monkeypatch, spec, runs, tmp_path):
    """The figures of the layers: stem -> what is drawn."""
    from paper_figs import layers as script
    from paper_figs import style

    caught = {}
    monkeypatch.setattr(style, "save", lambda made, stem: caught.setdefault(stem, made) and [stem])
    assert script.draw(spec, runs, tmp_path) == list(caught)
    return {stem.name: made for stem, made in caught.items()}


def bars(axis):
    """Fate -> its bars, as (bottom, height)."""
    return {each.get_label(): [(bar.get_y(), bar.get_height()) for bar in each] for each in axis.containers}


@pytest.mark.usefixtures("importable")
def test_the_layers_are_drawn_in_network_order_as_means_over_seeds(spec, tmp_path, monkeypatch):
    hap = [
        {"conv": "##--", "blocks.0": "--o#", "blocks.1": "####"},
        {"conv": "####", "blocks.0": "-oo#", "blocks.1": "##"},
    ]
    random = [{"conv": "----", "blocks.0": "####", "blocks.1": "#---"}]
    made = layers(monkeypatch, spec, planned(spec, {"hap": hap, "random": random}), tmp_path)["table-layers"]
    first, second = made.axes
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("hap", "random")
    assert bars(first) == {
        "dropped": [(0, 25), (0, 37.5), (0, 0)],
        "implants": [(25, 0), (37.5, 37.5), (0, 0)],
        "kept": [(25, 75), (75, 25), (0, 100)],
    }
    # of all rows: 4 and 1 of 12 and of 10 are dropped, 1 and 2 implants
    assert first.get_title(loc="right") == "22 % dropped, 14 % implants"
    assert second.get_title(loc="right") == "58 % dropped"
    assert [text.get_text() for text in second.get_xticklabels()] == ["conv", "blocks"]
    assert list(second.get_xticks()) == [0, 1.5]
    (legend,) = made.legends
    assert [text.get_text() for text in legend.get_texts()] == ["dropped", "implants", "kept"]
    assert legend.get_title().get_text() == "70 % of the parameters pruned; mean over seeds."


@pytest.mark.usefixtures("importable")
def test_methods_that_make_the_same_plans_share_a_panel(tmp_path, monkeypatch):
    text = SPEC + '[cases.tap]\nlike = "hap"\n[cases.other]\nlike = "hap"\n'
    spec = load_spec(write_spec(tmp_path, text))
    same, other = [{"conv": "##--"}, {"conv": "#-#-"}], [{"conv": "##--"}, {"conv": "-##-"}]
    runs = planned(spec, {"hap": same, "random": other, "tap": same, "other": same[:1]})
    made = layers(monkeypatch, spec, runs, tmp_path)["table-layers"]
    assert [axis.get_title(loc="left") for axis in made.axes] == ["hap, tap", "random", "other"]
    (legend,) = made.legends
    assert [text.get_text() for text in legend.get_texts()] == ["dropped", "kept"]
    assert legend.get_title().get_text().endswith("Methods that make the same plan share a panel.")


@pytest.mark.usefixtures("importable")
def test_the_layers_are_those_of_the_budget_that_most_methods_have_the_middle_one(tmp_path, monkeypatch):
    text = SPEC.split("[[claims]]")[0].replace("params = 0.7", "params = [0.3, 0.5, 0.7, 0.9]")
    text += '[cases.few]\nlike = "hap"\nimplant = false\nbudget = {params = [0.7, 0.9]}\n'
    text += '[cases.macs]\nlike = "few"\nbudget = {macs = [0.7]}\n'
    spec = load_spec(write_spec(tmp_path, text))
    every = {name: [{"conv": "#" * (1 + place) + "-"}] for place, name in enumerate(spec.cases)}
    some = {name: plan for name, plan in every.items() if name != "few@90"}
    for plans, percent, methods in (
        (every, 90, ["hap", "random", "few"]),  # 70 and 90 are shared by three
        (some, 70, ["hap", "random", "few"]),
        ({name: every[name] for name in list(every)[:3]}, 50, ["hap"]),
    ):
        made = layers(monkeypatch, spec, planned(spec, plans), tmp_path)["table-layers"]
        assert [axis.get_title(loc="left") for axis in made.axes] == methods
        assert made.legends[0].get_title().get_text().startswith(f"{percent} % of the parameters pruned;")


@pytest.mark.usefixtures("importable")
def test_networks_have_a_figure_each_and_records_without_plans_have_none(spec, tmp_path, monkeypatch):
    runs = planned(spec, {"hap": [{"conv": "##--"}], "random": [{"other": "##--"}]})
    found = layers(monkeypatch, spec, runs, tmp_path)
    assert {name: [axis.get_title(loc="left") for axis in made.axes] for name, made in found.items()} == {
        "table-layers-1": ["hap"],
        "table-layers-2": ["random"],
    }
    assert layers(monkeypatch, spec, {"hap": [fake_run(spec.cases["hap"], 0)], "random": []}, tmp_path) == {}
    assert layers(monkeypatch, spec, {}, tmp_path) == {}
    ranked_spec, ranked_runs = ranked(tmp_path)
    some = {name: [replace(run, plan={"rows": {"conv": "#-"}}) for run in each] for name, each in ranked_runs.items()}
    assert layers(monkeypatch, ranked_spec, some, tmp_path) == {}


@pytest.mark.usefixtures("importable")
def test_a_deep_network_and_long_names_stay_within_the_page(tmp_path):
    """The text of each panel and of the axis, as it would be drawn, beside its neighbours; colours it cannot see."""
    from paper_figs import layers as script
    from paper_figs import style

    names = ["hap-implants-by-least-sq", "hap-implants-by-some-long-way"]
    text = SPEC + "".join(f'[cases.{name}]\nlike = "hap"\n' for name in names)
    spec = load_spec(write_spec(tmp_path, text))
    stages = ["stem", *(f"layer{1 + n // 18}.{n}" for n in range(54)), "bn", "linear"]
    deep = dict.fromkeys(stages, "##-o")
    runs = planned(spec, {name: [deep] for name in ["hap", *names]} | {"random": [deep | {"stem": "####"}]})
    caught = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "save", lambda made, stem: caught.append(made) or [])
        script.draw(spec, runs, tmp_path)
    (made,) = caught
    made.draw_without_rendering()
    first, second = made.axes
    page = made.bbox
    labels = [label.get_window_extent() for label in second.get_xticklabels()]
    assert [label.get_text() for label in second.get_xticklabels()] == ["stem", "layer1", "layer2", "layer3", "bn"]
    assert all(left.x1 < right.x0 for left, right in pairwise(labels))
    left, right = first._left_title.get_window_extent(), first._right_title.get_window_extent()
    assert (
        first.get_title(loc="left").count("\n") == 3
    )  # a name a line, and one that the last, a long one, leaves to the numbers
    assert not left.overlaps(right)
    for box in (*labels, left, right, made.legends[0].get_window_extent()):
        assert page.x0 <= box.x0
        assert box.x1 <= page.x1
        assert page.y0 <= box.y0
        assert box.y1 <= page.y1
