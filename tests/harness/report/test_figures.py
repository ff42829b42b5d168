from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from fakes import REPORTED, SPEC, fake_run, with_accuracy, write_spec
from records import headed, planned, ranked
from scipy.stats import sem, t

from hap.harness.report import write as report
from hap.harness.spec.spec import load_spec

ROOT = Path(__file__).parents[3]


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
def test_a_line_a_method_with_intervals_as_scipy_has_them(tmp_path, monkeypatch):
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
    low, high = t.interval(0.95, 2, 95.0, sem([90.0, 93.0, 102.0]))
    drawn = [segment[:, 1].tolist() for segment in bars[0].lines[2][0].get_segments()]
    assert drawn == [pytest.approx([low, high])] * 2
    assert axes[1].get_ylim()[1] == 100  # though the interval goes on
    assert list(bars[0].lines[0].get_xdata()) == pytest.approx([30.0, 70.0], abs=1.0)
    assert axes[1].lines[0].get_label() == "dense, 95.00 %"
    assert axes[1].get_xlabel() == "parameters left (% of 1 k)"


@pytest.mark.usefixtures("importable")
def test_one_budget_without_fine_tuning_is_one_panel(tmp_path, monkeypatch):
    text = SPEC.replace("[finetune]\nepochs = 2\nlr = 0.1", "finetune = false")
    spec = load_spec(write_spec(tmp_path, text))
    runs = {name: [fake_run(case, 0)] for name, case in spec.cases.items()}
    (axis,) = panels(monkeypatch, spec, runs, tmp_path)
    assert axis.get_xlabel() == "one budget: 28 % of the parameters left"


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("size", ["params", "macs"])
def test_what_others_published_of_another_budget_lies_within_the_panel(tmp_path, size):
    from paper_figs import accuracy, style

    spec = load_spec(write_spec(tmp_path, SPEC + REPORTED))
    runs = {name: [fake_run(case, 0)] for name, case in spec.cases.items()}
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "save", lambda made, stem: drawn.append(made) or [])
        accuracy.against(spec, runs, tmp_path / "figure", size)
    tuned = drawn[0].axes[1]
    low, high = tuned.get_xlim()
    assert low < stars(tuned)[0].get_xdata()[0] < high
    assert low < tuned.containers[0].lines[0].get_xdata()[0] < high
    assert tuned.get_xlabel().startswith({"params": "parameters", "macs": "MACs"}[size] + " left (% of ")
    assert accuracy.against(spec, runs, tmp_path / "figure", size)  # laid out without a warning


@pytest.mark.usefixtures("importable")
def test_rankings_have_figures_of_their_own(tmp_path, monkeypatch):
    from paper_figs import accuracy_vs_params, probes_accuracy, probes_ranking, style

    spec, runs = ranked(tmp_path)
    caught = []
    monkeypatch.setattr(style, "save", lambda made, stem: caught.append((stem.name, made.axes)) or [stem])
    assert accuracy_vs_params.draw(spec, runs, tmp_path) == []
    assert len([*probes_ranking.draw(spec, runs, tmp_path), *probes_accuracy.draw(spec, runs, tmp_path)]) == 2
    (name, (spearman, overlap)), (other, panels) = caught
    assert (name, other) == ("ranked-ranking", "ranked-accuracy")
    (line,) = spearman.get_lines()[:1]
    assert list(line.get_xdata()) == [3, 30]
    assert list(line.get_ydata()) == pytest.approx([0.3, 0.4])
    assert overlap.get_lines()[0].get_ydata()[0] == pytest.approx(0.28)
    assert len(panels) == 1
    assert list(panels[0].get_lines()[0].get_ydata()) == pytest.approx([61, 61])
    assert probes_ranking.draw(spec, {}, tmp_path) == probes_accuracy.draw(spec, {}, tmp_path) == []


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


@pytest.mark.usefixtures("importable")
def test_heads_have_figures_of_their_own(tmp_path, monkeypatch):
    from paper_figs import accuracy_vs_params, heads, heads_kept, heads_ranking, probes_accuracy, probes_ranking, style

    spec, runs = headed(tmp_path)
    caught = {}
    monkeypatch.setattr(style, "save", lambda made, stem: caught.setdefault(stem.name, made) and [stem])
    assert probes_ranking.draw(spec, runs, tmp_path) == probes_accuracy.draw(spec, runs, tmp_path) == []
    assert accuracy_vs_params.draw(spec, runs, tmp_path)
    assert caught["headed-accuracy_vs_params"].axes[0].get_ylabel() == "test F1 (%)"
    assert all(script.draw(spec, runs, tmp_path) for script in (heads, heads_kept, heads_ranking))
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
    assert not any(script.draw(spec, {}, tmp_path) for script in (heads, heads_kept, heads_ranking))


@pytest.mark.usefixtures("importable")
def test_a_spec_without_heads_has_no_figure_of_them(spec, runs, tmp_path):
    from paper_figs import heads, heads_kept, heads_ranking

    assert not any(script.draw(spec, runs, tmp_path) for script in (heads, heads_kept, heads_ranking))


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


ABSOLUTE = """
[[claims]]
text = "94 % after pruning"
source = "[Yu22]"
case = "hap@70"
metric = "accuracy"
op = ">="
value = 94
over = "seeds"
family = "paper"
"""


def swept(tmp_path, text=""):
    """A spec of two methods at three budgets, what others reported of it, and records whose size is the budget's."""
    given = SPEC.split("[[claims]]")[0].replace("params = 0.7", "params = [0.3, 0.5, 0.7]")
    spec = load_spec(write_spec(tmp_path, given + ABSOLUTE + REPORTED + text))
    runs = {}
    for case in spec.cases.values():
        left, lag = 1 - case.budget.params, 3.0 * case.name.startswith("random")
        cost = fake_run(case, 0).cost
        pruned = {
            "params": round(1000 * left),
            "macs": round(5000 * (0.2 + 0.8 * left)),
            "latency_seconds": {"1": 0.001, "64": 0.02 * (0.4 + 0.6 * left)},
        }
        made = [fake_run(case, seed, cost=cost | {"pruned": pruned}) for seed in spec.seeds]
        made = [with_accuracy(run, "one_shot", 20 + 60 * left - 2 * lag + run.seed) for run in made]
        runs[case.name] = [with_accuracy(run, "selected", 90 + 5 * left - lag + 0.2 * run.seed) for run in made]
    return spec, runs


def stars(axis):
    """Where the numbers of others stand."""
    return [line for line in axis.get_lines() if line.get_marker() == "*"]


@pytest.mark.usefixtures("importable")
def test_what_others_published_and_what_is_claimed_have_marks_of_their_own(tmp_path, monkeypatch):
    spec, runs = swept(tmp_path)
    made = figure(monkeypatch, spec, runs, tmp_path)
    one_shot, tuned = made.axes
    assert stars(one_shot) == []
    sized, edge = stars(tuned)  # HRank gives no size
    assert (sized.get_xdata()[0], sized.get_ydata()[0]) == (pytest.approx(50.18), 93.2)
    assert (edge.get_xdata()[0], edge.get_ydata()[0]) == (1.0, 93.17)
    assert edge.get_transform().transform((1.0, 93.17))[0] == pytest.approx(tuned.bbox.x1)
    assert [text.get_text() for text in tuned.texts] == ["1", "2"]
    (claimed,) = [line for line in tuned.get_lines() if line.get_marker() == "_" and line.get_markersize() == 16]
    assert (claimed.get_xdata()[0], claimed.get_ydata()[0]) == (pytest.approx(30.0), 94)
    title = made.legends[0].get_title().get_text()
    assert "Stars: published by others, numbered as in the table." in title
    assert "At the right edge: published without a size." in title
    assert "Wide strokes: what is claimed of a method there." in title


@pytest.mark.usefixtures("importable")
def test_macs_and_latency_have_their_axes_and_units(tmp_path, monkeypatch):
    from paper_figs import accuracy_vs_macs, latency_vs_macs, style

    spec, runs = swept(tmp_path)
    caught = {}
    monkeypatch.setattr(style, "save", lambda made, stem: caught.setdefault(stem.name, made) and [stem])
    accuracy_vs_macs.draw(spec, runs, tmp_path)
    latency_vs_macs.draw(spec, runs, tmp_path)
    accuracy, latency = caught["table-accuracy_vs_macs"].axes, caught["table-latency_vs_macs"].axes
    assert accuracy[1].get_xlabel() == latency[1].get_xlabel() == "MACs left (% of 5 k)"
    assert stars(accuracy[1])[0].get_xdata()[0] == 50  # GReg-1
    assert [axis.get_title(loc="left") for axis in latency] == [
        "batch of 1; dense: 1 ms on average",
        "batch of 64; dense: 20 ms on average",
    ]
    assert list(latency[1].containers[0].lines[0].get_ydata()) == pytest.approx([58, 70, 82])
    assert latency[0].get_ylabel() == "latency left (%)"
    assert "Timed on an unknown device." in caught["table-latency_vs_macs"].legends[0].get_title().get_text()
    none = {name: [] for name in spec.cases}
    assert latency_vs_macs.draw(spec, none, tmp_path) == accuracy_vs_macs.draw(spec, none, tmp_path) == []


@pytest.mark.usefixtures("importable")
def test_scores_are_timed_once_each_and_the_cheapest_comes_first(tmp_path, monkeypatch):
    from paper_figs import cost_of_scoring, style

    method = '[cases.own]\nlike = "hap"\nimplant = false\nmethod = "fakes:method"\nbudget = {params = [0.7]}\n'
    spec, runs = swept(tmp_path, "\n" + method)
    for name, each in runs.items():
        seconds = {"hap": 5.0, "random": 0.0}.get(name.split("@")[0])
        told = {"prune": 50.0} if seconds is None else {"score": seconds}
        runs[name] = [replace(run, seconds=told | {"task": 1.0}) for run in each]
    runs["hap@70"] = [replace(run, seconds={"score": 8.0}) for run in runs["hap@70"]]
    caught = []
    monkeypatch.setattr(style, "save", lambda made, stem: caught.append(made) or [stem])
    cost_of_scoring.draw(spec, runs, tmp_path)
    ((axis,),) = (made.axes for made in caught)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["random", "hap", "own"]
    means = [bar.lines[0].get_xdata()[0] for bar in axis.containers]
    assert means == [1e-4, 6.5, 50.0]  # two times of a seed are one; no time at all is drawn as the least
    assert [bar.lines[0].get_markerfacecolor() for bar in axis.containers][1:] == [style.PALETTE[0], "white"]
    assert axis.get_xlabel().endswith("(s)")
    assert "whole pruning" in caught[0].legends[0].get_title().get_text()
    assert cost_of_scoring.draw(spec, {}, tmp_path) == []


def test_every_figure_is_one_column_wide_and_its_text_is_large_enough():
    import importlib
    import sys

    sys.path.insert(0, str(ROOT))
    style = importlib.import_module("paper_figs.style")
    sys.path.remove(str(ROOT))
    assert style.COLUMN_INCHES == 3.3
    assert min(value for name, value in style.RULES.items() if name.endswith("size") and "marker" not in name) >= 7


def drawn(monkeypatch, script, spec, runs, tmp_path):
    """One figure of a script, caught before it is written."""
    from importlib import import_module

    from paper_figs import style

    caught = []
    monkeypatch.setattr(style, "save", lambda made, stem: caught.append(made) or [stem])
    import_module(f"paper_figs.{script}").draw(spec, runs, tmp_path)
    (made,) = caught
    return made


# Letters differ a little between versions of freetype. Measured: without stars 17, without lines 15, without bars 6.3,
# with two colours exchanged 9 and more. `pytest --mpl-generate-path=tests/harness/baseline` makes the baselines anew.
LOOKS = pytest.mark.mpl_image_compare(
    baseline_dir="../baseline", tolerance=6, style="default", savefig_kwargs={"dpi": 80}
)


@LOOKS
@pytest.mark.parametrize("script", ["accuracy_vs_params", "accuracy_vs_macs", "latency_vs_macs", "cost_of_scoring"])
@pytest.mark.usefixtures("importable")
def test_looks(tmp_path, monkeypatch, script):
    return drawn(monkeypatch, script, *swept(tmp_path), tmp_path)


@LOOKS
@pytest.mark.usefixtures("importable")
def test_looks_of_layers(tmp_path, monkeypatch):
    spec = load_spec(write_spec(tmp_path))
    plans = {
        "hap": [{"a.0": "##-o", "a.1": "#---", "b": "oo##"}],
        "random": [{"a.0": "#-#-", "a.1": "----", "b": "####"}],
    }
    return drawn(monkeypatch, "layers", spec, planned(spec, plans), tmp_path)


@LOOKS
@pytest.mark.parametrize("script", ["probes_ranking", "probes_accuracy"])
@pytest.mark.usefixtures("importable")
def test_looks_of(tmp_path, monkeypatch, script):
    return drawn(monkeypatch, script, *ranked(tmp_path), tmp_path)


@LOOKS
@pytest.mark.parametrize("script", ["heads", "heads_kept", "heads_ranking"])
@pytest.mark.usefixtures("importable")
def test_looks_of_heads(tmp_path, monkeypatch, script):
    return drawn(monkeypatch, script, *headed(tmp_path), tmp_path)
