import datetime
import json
import re
from pathlib import Path

import pytest
from fakes import REPORTED, SPEC, write_spec

from hap import HapError
from hap.harness.spec.cases import smoke
from hap.harness.spec.functions import Ref
from hap.harness.spec.spec import find_specs, load_spec
from hap.harness.train.loop import Recipe
from hap.plan import Budget

ROOT = Path(__file__).parents[3]
BUDGET = "budget = {params = 0.7, implant = 0.1}"
SCORE = 'score = {use = "fakes:score", curvature = "exact"}'
CASE = 'case = "hap"\nmetric'


def changed(old: str, new: str) -> str:
    assert SPEC.count(old) >= 1, old
    return SPEC.replace(old, new, 1)


def load(folder: Path, text: str = SPEC, name: str = "table"):
    return load_spec(write_spec(folder, text, name))


def test_a_spec_is_read_inherited_and_bound(tmp_path):
    spec = load(tmp_path)
    assert (spec.name, spec.tier, spec.seeds, list(spec.cases)) == ("table", "quick", (0, 1, 2), ["hap", "random"])
    hap, random = spec.cases["hap"], spec.cases["random"]
    assert hap.task == Ref(use="fakes:task", options={"width": 8})
    assert hap.score == Ref(use="fakes:score", options={"curvature": "exact"})
    assert hap.budget == Budget(params=0.7, implant=0.1)
    assert hap.finetune == Recipe(epochs=2, lr=0.1)
    assert (hap.coupling, hap.method, hap.spec, hap.name) == ("union", None, "table", "hap")
    assert random.score == Ref(use="fakes:random")
    assert (random.budget, random.implant) == (hap.budget, hap.implant)
    assert spec.claims[1].against == "random"
    assert (spec.claims[1].stage, spec.claims[1].confidence) == ("selected", 0.95)


def test_a_ref_loads_the_function_it_names():
    assert Ref(use="datetime:date.fromisoformat").load()("2026-11-21") == datetime.date(2026, 11, 21)


def test_a_list_of_fractions_makes_a_case_each(tmp_path):
    spec = load(
        tmp_path, changed(BUDGET, "budget = {params = [0.3, 0.5, 0.725], implant = 0.1}").split("[[claims]]")[0]
    )
    assert list(spec.cases)[:3] == ["hap@30", "hap@50", "hap@72.5"]
    assert spec.cases["hap@72.5"].budget == Budget(params=0.725, implant=0.1)
    assert spec.cases["random@50"].score == Ref(use="fakes:random")
    assert len({case.key for case in spec.cases.values()}) == 6


def test_a_budget_may_be_given_by_layer(tmp_path):
    text = changed(BUDGET, 'budget = {ratios = {"layer1.*" = [0.5, 0.7], "layer2.*" = 0.3}, implant = 0.1}')
    spec = load(tmp_path, text.split("[[claims]]")[0])
    assert list(spec.cases)[:2] == ["hap@50", "hap@70"]
    assert spec.cases["hap@70"].budget == Budget(ratios={"layer1.*": 0.7, "layer2.*": 0.3}, implant=0.1)


def test_a_case_may_name_an_update(tmp_path):
    case = load(tmp_path, changed(SCORE, SCORE + '\nupdate = {use = "hap.updates:least_squares", ridge = 0.1}')).cases[
        "hap"
    ]
    assert case.update == Ref(use="hap.updates:least_squares", options={"ridge": 0.1})
    assert case.key != load(tmp_path).cases["hap"].key
    weighted = load(tmp_path, changed(SCORE, SCORE + '\nupdate = "hap.updates:curvature_weighted"'))
    assert weighted.cases["hap"].update.options == {}


def test_a_case_may_prune_some_layers_only(tmp_path):
    spec = load(tmp_path, changed("params = 0.7", 'params = 0.7, only = ["*.conv1"], except = ["layer1.*"]'))
    assert spec.cases["hap"].budget == Budget(params=0.7, implant=0.1, only=["*.conv1"], except_=["layer1.*"])
    assert spec.cases["hap"].config["budget"]["except"] == ["layer1.*"]
    assert spec.cases["hap"].key != load(tmp_path).cases["hap"].key


def test_no_committed_evidence_is_an_orphan():
    """A field that a later version adds, and that a spec does not give, must be part of no key."""
    for file in find_specs(ROOT / "reproductions"):
        names = {f"{case.name}-{case.key}" for case in load_spec(file).cases.values()}
        assert {path.parent.name for path in (ROOT / "results" / file.stem).glob("*/seed*.json")} <= names


def test_an_heir_replaces_score_by_method_and_switches_things_off(tmp_path):
    heir = (
        '[cases.mine]\nlike = "random"\nmethod = {use = "fakes:method", steps = 3}\nimplant = false\nfinetune = false\n'
    )
    mine = load(tmp_path, SPEC + heir).cases["mine"]
    assert (mine.score, mine.implant, mine.finetune) == (None, None, None)
    assert mine.method == Ref(use="fakes:method", options={"steps": 3})
    assert mine.budget == Budget(params=0.7, implant=0.1)


def test_a_case_may_bring_its_own_task_and_recipe(tmp_path):
    text = changed(BUDGET, BUDGET + '\ntask = {use = "fakes:hungry_task", width = 2}\nfinetune = {epochs = 1, lr = 1}')
    spec = load(tmp_path, text)
    assert spec.cases["hap"].task == Ref(use="fakes:hungry_task", options={"width": 2})
    assert spec.cases["random"].finetune == Recipe(epochs=1, lr=1)


def test_a_function_that_takes_anything_takes_any_option(tmp_path):
    spec = load(tmp_path, changed(SCORE, 'score = {use = "fakes:open_score", anything = [1, {a = true}]}'))
    assert spec.cases["hap"].score == Ref(use="fakes:open_score", options={"anything": [1, {"a": True}]})


def test_find_specs_sorts_and_stays_in_the_folder(tmp_path):
    for name in ("b", "a"):
        write_spec(tmp_path, name=name)
    (tmp_path / "reproductions" / "deeper").mkdir()
    (tmp_path / "reproductions" / "deeper" / "c.toml").write_text("")
    assert [path.stem for path in find_specs(tmp_path / "reproductions")] == ["a", "b"]


def test_keys_are_stable(tmp_path):
    """A change of this number orphans all committed evidence: it must be on purpose."""
    assert load(tmp_path).cases["hap"].key == "12f92d1e32"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('title = "A made-up table"', 'title = "Another"'),
        ("seeds = [0, 1, 2]", "seeds = [7]"),
        ("value = 70", "value = 60"),
        ("epochs = 2", "epochs = 2\nnesterov = false"),  # a switch that is off
        ("[cases.hap]", "[cases.hap]\ncoupling = 'union'"),
        ("[cases.hap]", "[cases.hap]\nrecalibrate = false"),
        ("[cases.hap]", "[cases.hap]\nprune = 'all'"),
        ("seeds = [0, 1, 2]", 'metric = "f1"\nseeds = [0, 1, 2]'),
        ("[cases.hap]", REPORTED + "\n[cases.hap]"),
        ("[finetune]", 'needs = "an afternoon"\n[finetune]'),
    ],
)
def test_the_key_ignores_what_does_not_decide_the_result(tmp_path, old, new):
    assert load(tmp_path, changed(old, new)).cases["hap"].key == load(tmp_path).cases["hap"].key


def test_the_key_ignores_names(tmp_path):
    text = (
        SPEC.replace("[cases.hap]", "[cases.ours]")
        .replace('like = "hap"', 'like = "ours"')
        .replace('case = "hap"', 'case = "ours"')
    )
    assert load(tmp_path, text, "other").cases["ours"].key == load(tmp_path).cases["hap"].key


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("width = 8", "width = 9"),
        (SCORE, 'score = "fakes:score"'),
        (SCORE, 'score = "fakes:random"'),
        (SCORE, 'method = "fakes:method"'),
        ("[cases.hap]", "[cases.hap]\ncoupling = 'tied'"),
        ("[cases.hap]", "[cases.hap]\nrecalibrate = true"),
        ("epochs = 2", 'epochs = 2\noptimiser = "adamw"'),
        ("epochs = 2", "epochs = 2\nclip = 1.0"),
        ("params = 0.7", "prunable = 0.7"),
        ("implant = 0.1}", "implant = 0.1, rank = 2}\nprune = 'heads'"),
        ('implant = "fakes:implant"', 'implant = "fakes:implant_too"'),
        ("params = 0.7", "params = 0.71"),
        ("params = 0.7", "macs = 0.7"),
        ("implant = 0.1}", "implant = 0.2}"),
        ("implant = 0.1}", "implant = 0.1, multiple = 8}"),
        ("epochs = 2", "epochs = 3"),
        ("epochs = 2", "epochs = 2\nnesterov = true"),
        ("[finetune]\nepochs = 2\nlr = 0.1", "finetune = false"),
    ],
)
def test_the_key_covers_what_decides_the_result(tmp_path, old, new, monkeypatch):
    import fakes

    monkeypatch.setattr(fakes, "implant_too", fakes.implant, raising=False)
    text = changed(old, new)
    if "fakes:method" in new:
        text = text.replace('implant = "fakes:implant"\n', "").replace(
            'score = "fakes:random"', 'score = "fakes:random"\nimplant = "fakes:implant"'
        )
    assert load(tmp_path, text).cases["hap"].key != load(tmp_path).cases["hap"].key


MALFORMED = {
    "not toml": ("tier =", "tier", "file", "must be TOML"),
    "not a date": ("width = 8", "width = 2026-11-21", "task.width", "finite number"),
    "not nan": ("value = 70", "value = nan", "claims[1].value", "finite number"),
    "unknown top field": ("tier =", "colour = 1\ntier =", "colour", "unknown field"),
    "no title": ('title = "A made-up table"', "", "title", "is required"),
    "blank paper": ('paper = "[Yu22]"', 'paper = " "', "paper", "at least 1 character"),
    "wrong tier": ('tier = "quick"', 'tier = "slow"', "tier", "'quick', 'cpu' or 'gpu' (found 'slow')"),
    "no seeds": ("seeds = [0, 1, 2]", "seeds = []", "seeds", "at least 1 item"),
    "seeds of a wrong type": ("seeds = [0, 1, 2]", "seeds = [0, 1.5]", "seeds[2]", "integer (found 1.5)"),
    "a boolean is no seed": ("seeds = [0, 1, 2]", "seeds = [true]", "seeds[1]", "integer (found True)"),
    "negative seed": ("seeds = [0, 1, 2]", "seeds = [-1]", "seeds[1]", "greater than or equal to 0 (found -1)"),
    "repeated seed": ("seeds = [0, 1, 2]", "seeds = [1, 1]", "seeds", "must not repeat (found [1, 1])"),
    "no task": ('task = {use = "fakes:task", width = 8}', "", "cases.hap.task", "is required"),
    "task without use": ('use = "fakes:task", ', "", "task.use", "is required"),
    "a name of a wrong shape": ('"fakes:task"', '"fakes.task"', "task.use", "match pattern"),
    "unknown module": ('"fakes:task"', '"nowhere:task"', "task", "No module named 'nowhere') (found 'nowhere:task')"),
    "unknown function": ('"fakes:score"', '"fakes:scores"', "cases.hap.score", "has no attribute 'scores'"),
    "not a function": ('"fakes:score"', '"fakes:not_a_function"', "cases.hap.score", "must name a function"),
    "surplus option": ("width = 8", "depth = 8", "task.depth", "unknown option; known are width (found 8)"),
    "surplus option of none": (
        '"fakes:random"',
        '{use = "fakes:random", a = 1}',
        "cases.random.score.a",
        "none is known",
    ),
    "option of a wrong type": ("width = 8", "width = '8'", "task.width", "valid integer (found '8')"),
    "option not among its values": (
        'curvature = "exact"',
        'curvature = "exakt"',
        "cases.hap.score.curvature",
        "'exact' or",
    ),
    "the caller's argument": ("width = 8", "seed = 8", "task.seed", "unknown option"),
    "missing option": ('"fakes:task", width = 8', '"fakes:hungry_task"', "task", "missing a required"),
    "not a score": ('"fakes:random"', '"fakes:no_rng"', "cases.random.score", "unexpected keyword argument 'rng'"),
    "no function at all": (SCORE, "", "cases.hap", "exactly one of score and method (found [])"),
    "score and method": (SCORE, SCORE + '\nmethod = "fakes:method"', "cases.hap", "exactly one of score and method"),
    "implant beside a method": (SCORE, 'method = "fakes:method"', "cases.hap.implant", "brings its own"),
    "unknown coupling": ("[cases.hap]", '[cases.hap]\ncoupling = "loose"', "cases.hap.coupling", "'tied' or 'union'"),
    "implant without a share": (", implant = 0.1", "", "cases.hap.implant", "exactly when budget.implant is above 0"),
    "share without an implant": ('implant = "fakes:implant"\n', "", "cases.hap.implant", "exactly when"),
    "no budget": (BUDGET, "", "cases.hap.budget", "is required"),
    "impossible budget": ("params = 0.7", "params = 1.7", "cases.hap.budget.params", "1.7"),
    "two budgets": ("params = 0.7", "params = 0.7, macs = 0.7", "cases.hap.budget", "exactly one"),
    "budget of nothing": ("params = 0.7, ", "", "cases.hap.budget", "exactly one"),
    "unknown budget": ("params = 0.7", "flops = 0.7", "cases.hap.budget.flops", "unknown option"),
    "budget of a wrong type": ("params = 0.7", "params = '0.7'", "cases.hap.budget.params", "valid number"),
    "an empty list": ("params = 0.7", "params = []", "cases.hap.budget", "not an empty one"),
    "a ratio too large": ("params = 0.7", "ratios = {a = 1.7}", "cases.hap.budget.ratios", "1.7"),
    "globs as a string": ("params = 0.7", "params = 0.7, only = 'a'", "cases.hap.budget.only", "array"),
    "an update with an unknown option": (
        SCORE,
        SCORE + "\nupdate = {use = 'hap.updates:mean', ridge = 1}",
        "cases.hap.update.ridge",
        "unknown option",
    ),
    "an update of a method": (
        SCORE + '\nimplant = "fakes:implant"',
        "method = 'fakes:method'\nupdate = 'hap.updates:mean'",
        "cases.hap.update",
        "a method brings its own updates",
    ),
    "two lists": (BUDGET, "budget = {params = [0.7], implant = [0.1]}", "cases.hap.budget", "may give one list"),
    "one case twice": ("params = 0.7", "params = [0.7, 0.7]", "cases.hap.budget", "twice (found 'hap@70')"),
    "a list with a bad item": ("params = 0.7", "params = [0.7, 'x']", "cases.hap.budget.params", "valid number"),
    "recipe without a rate": ("lr = 0.1", "", "finetune", "missing a required argument: 'lr'"),
    "recipe that cannot be": ("epochs = 2", "epochs = 0", "finetune.epochs", "found 0"),
    "recipe with surplus": ("epochs = 2", "epoch = 2", "finetune.epoch", "unknown option"),
    "a case inherits itself": ("[cases.hap]", '[cases.hap]\nlike = "random"', "cases.hap.like", "hap -> random -> hap"),
    "an unknown parent": ('like = "hap"', 'like = "hat"', "cases.random.like", "one of hap, random (found 'hat')"),
    "an unknown field of a case": ("[cases.hap]", "[cases.hap]\nfine = 1", "cases.hap.fine", "unknown field"),
    "a name no folder can have": ("[cases.hap]", '[cases."a/b"]\n[cases.hap]', "cases.a/b", "match pattern"),
    "no source": ('source = "[Yu22] abstract"\n', "", "claims[1].source", "is required"),
    "blank source": ('source = "[Yu22] abstract"', 'source = "  "', "claims[1].source", "at least 1 character"),
    "claim of an unknown case": (CASE, 'case = "hop"\nmetric', "claims[1].case", "one of hap, random (found 'hop')"),
    "against an unknown case": ('against = "random"', 'against = "x"', "claims[2].against", "(found 'x')"),
    "against itself": ('against = "random"', 'against = "hap"', "claims[2].against", "another case"),
    "unknown metric": ('metric = "params_pruned"', 'metric = "size"', "claims[1].metric", "(found 'size')"),
    "unknown main metric": ("seeds = [0, 1, 2]", 'metric = "auc"\nseeds = [0, 1, 2]', "metric", "(found 'auc')"),
    "something else to prune": (
        "[cases.hap]",
        "[cases.hap]\nprune = 'neurons'",
        "cases.hap.prune",
        "(found 'neurons')",
    ),
    "heads without a rank": (
        "[cases.hap]",
        "[cases.hap]\nprune = 'heads'",
        "cases.hap.budget.rank",
        "is given exactly when heads become implants (found None)",
    ),
    "a rank without heads": (
        "implant = 0.1}",
        "implant = 0.1, rank = 4}",
        "cases.hap.budget.rank",
        "is given exactly when heads become implants (found 4)",
    ),
    "a negative rank": ("implant = 0.1}", "implant = 0.1, rank = -1}", "cases.hap.budget.rank", "found -1"),
    "unknown optimiser": ("epochs = 2", 'epochs = 2\noptimiser = "lion"', "finetune.optimiser", "found 'lion'"),
    "unknown op": ('op = ">="', 'op = ">"', "claims[1].op", "(found '>')"),
    "a stage without meaning": (
        'metric = "params_pruned"',
        'metric = "params_pruned"\nstage = "last"',
        "claims[1].stage",
        "means",
    ),
    "negative tolerance": ("tolerance = 0.5", "tolerance = -0.5", "claims[2].tolerance", "(found -0.5)"),
    "value of a wrong type": ("value = 70", 'value = "70"', "claims[1].value", "valid number (found '70')"),
    "certainty": ("tolerance = 0.5", "confidence = 1.0", "claims[2].confidence", "less than 1"),
    "recalibration of a wrong type": (
        "[cases.hap]",
        "[cases.hap]\nrecalibrate = 1",
        "cases.hap.recalibrate",
        "boolean",
    ),
    "a claim about nothing": ('over = "seeds"\n', "", "claims[1].over", "is required"),
    "a claim about images alone": ('over = "seeds"\n', 'over = "images"\n', "claims[1].over", "(found 'images')"),
    "a count over images": (
        'over = "seeds"\n',
        'over = "seeds and images"\n',
        "claims[1].over",
        "must be \"seeds\" for params_pruned (found 'seeds and images')",
    ),
    "no family": ('family = "sizes"\n', "", "claims[1].family", "is required"),
    "negative effect": ("effect = 2", "effect = -2", "claims[1].effect", "(found -2)"),
    "looks that are none": ("seeds = [0, 1, 2]", "seeds = {looks = []}", "seeds", "must be a list, or {looks"),
    "looks that shrink": ("seeds = [0, 1, 2]", "seeds = {looks = [6, 3]}", "seeds", "more at each look"),
    "a look at one seed": ("seeds = [0, 1, 2]", "seeds = {looks = [1, 3]}", "seeds", "with two or more seeds"),
    "looks and more": ("seeds = [0, 1, 2]", "seeds = {looks = [3], first = 1}", "seeds", "{'looks': [3], 'first': 1}"),
    "looks outside of seeds": ("seeds = [0, 1, 2]", "seeds = [0]\nlooks = [3]", "looks", "is a part of seeds"),
    "a source of what a stand-in shows": (
        "[finetune]",
        'stand_in = "ResNet50"\n[finetune]',
        "claims[1].source",
        "a stand-in shows nothing of it",
    ),
    "no reason to regroup": ("[finetune]", 'regrouped = ""\n[finetune]', "regrouped", "at least 1 character"),
    "an assumption without a spread": ("{seeds = 0.1}", "{images = 450}", "assumed.accuracy.seeds", "is required"),
    "needs nothing": ("[finetune]", 'needs = " "\n[finetune]', "needs", "at least 1 character"),
    "known without a why": ("tolerance = 0.5", 'known = ""', "claims[2].known", "at least 1 character"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_spec_ends_in_one_line_with_file_and_path(tmp_path, name):
    old, new, where, rule = MALFORMED[name]
    path = write_spec(tmp_path, changed(old, new))
    with pytest.raises(HapError) as caught:
        load_spec(path)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert text.startswith(f"{path}: {where}: ")
    assert rule in text
    assert caught.value.__cause__ is None


def test_a_mistake_of_the_parent_is_reported_where_it_was_written(tmp_path):
    text = re.sub(r"\[cases.random\]\n.*\n.*\n", "", changed("params = 0.7", "params = 0"))
    text = text.replace("[cases.hap]", '[cases.random]\nlike = "hap"\nscore = "fakes:random"\n\n[cases.hap]')
    with pytest.raises(HapError, match=r": cases\.hap\.budget\.params: "):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, "must be readable (found 'No such file"),
        (b"\xff", "must be TOML in UTF-8 (found "),
        (b"", "title: is required"),
    ],
)
def test_a_file_that_is_none_ends_in_one_line(tmp_path, content, rule):
    path = tmp_path / "x.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(HapError) as caught:
        load_spec(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert rule in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_fails_to_import_is_a_mistake_of_the_spec(tmp_path, monkeypatch):
    (tmp_path / "broken_method.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(HapError, match=r"cases\.hap\.score: .*ZeroDivisionError: division by zero"):
        load(tmp_path, changed(SCORE, 'score = "broken_method:score"'))


@pytest.mark.parametrize("path", find_specs(ROOT / "reproductions"), ids=lambda path: path.stem)
def test_our_own_specs_read(path):
    spec = load_spec(path)
    assert spec.claims
    assert len({case.key for case in spec.cases.values()}) == len(spec.cases)


def test_a_function_without_a_signature_is_refused(tmp_path):
    with pytest.raises(HapError, match=r"cases\.hap\.score: no signature found for builtin"):
        load(tmp_path, changed(SCORE, 'score = "builtins:breakpoint"'))


def test_a_type_that_only_the_function_knows_is_left_to_it(tmp_path, monkeypatch):
    import fakes

    class Own:
        pass

    def typed(model, loss, batches, groups, *, rng, own: Own, named: "nowhere.Type"):
        pass

    monkeypatch.setattr(fakes, "typed", typed, raising=False)
    score = load(tmp_path, changed(SCORE, 'score = {use = "fakes:typed", own = 1, named = 2}')).cases["hap"].score
    assert score == Ref(use="fakes:typed", options={"own": 1, "named": 2})


COMPARED = """
[cases.noisy]
like = "hap"
score = {use = "fakes:noisy", probes = 5}
reference = {use = "fakes:score", curvature = "exact"}

[[claims]]
text = "a noisy ranking is near the exact one"
source = "the suite"
case = "noisy"
metric = "spearman"
op = ">="
value = 0.9
over = "seeds"
family = "rankings"
"""


def test_a_reference_is_bound_like_a_score_and_decides(tmp_path):
    spec = load(tmp_path, SPEC + COMPARED)
    assert spec.cases["noisy"].reference == Ref(use="fakes:score", options={"curvature": "exact"})
    assert "reference" not in spec.cases["hap"].decides  # nor does it move the keys of others
    assert "reference" in spec.cases["noisy"].decides
    whole = SPEC.replace("[finetune]", 'reference = "fakes:random"\n\n[finetune]')
    assert load(tmp_path, whole).cases["random"].reference == Ref(use="fakes:random")


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ('case = "noisy"\nmetric = "spearman"', 'case = "hap"\nmetric = "spearman"',
         "claims[3].metric: needs cases with a reference (found 'spearman')"),
        ('metric = "spearman"', 'metric = "overlap"\nstage = "selected"',
         "claims[3].stage: means nothing for overlap"),
        ('reference = {use = "fakes:score", curvature = "exact"}', 'reference = {use = "fakes:score", curvature = "x"}',
         "cases.noisy.reference.curvature: Input should be 'exact' or 'hutchinson' (found 'x')"),
        ('score = {use = "fakes:noisy", probes = 5}', 'method = "fakes:method"\nimplant = false',
         "cases.noisy.reference: a method has no scores to compare"),
        ("probes = 5", "pruned = 5", "cases.noisy.score.pruned: unknown option; known are probes"),
    ],
)  # fmt: skip
def test_a_reference_that_makes_no_sense_is_a_mistake(tmp_path, old, new, rule):
    assert old in COMPARED
    with pytest.raises(HapError) as caught:
        load(tmp_path, SPEC + COMPARED.replace(old, new, 1))
    assert rule in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 5000,
        "a" + ".a" * 5000 + " = 1",
        "a = " + "{a = " * 5000,
        SPEC.replace("params = 0.7", f"params = {'9' * 400}"),
    ],
    ids=["lists", "names", "tables", "a number"],
)
def test_a_spec_without_end_is_one_line(tmp_path, text):
    (tmp_path / "endless.toml").write_text(text)
    with pytest.raises(HapError) as caught:
        load_spec(tmp_path / "endless.toml")
    assert str(caught.value).startswith(f"{tmp_path / 'endless.toml'}: ")
    assert "\n" not in str(caught.value)


def test_a_module_that_ends_python_is_a_mistake(tmp_path, monkeypatch):
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(HapError, match=r"cases.hap.score: must name a function that exists \(SystemExit: 3\)"):
        load(tmp_path, SPEC.replace('use = "fakes:score"', 'use = "leaving:score"', 1))


def test_a_ranking_is_compared_with_a_ranking(tmp_path):
    two = COMPARED.replace('metric = "spearman"', 'metric = "spearman"\nagainst = "hap"')
    with pytest.raises(HapError, match="needs cases with a reference"):
        load(tmp_path, SPEC + two)


def test_recalibration_is_inherited_and_allowed_beside_a_method(tmp_path):
    heir = '[cases.mine]\nlike = "hap"\nmethod = "fakes:method"\nimplant = false\n'
    spec = load(tmp_path, changed("[cases.hap]", "[cases.hap]\nrecalibrate = true") + heir)
    assert spec.cases["mine"].recalibrate
    assert spec.cases["mine"].config["recalibrate"] is True
    assert not load(tmp_path).cases["hap"].recalibrate
    assert "recalibrate" not in load(tmp_path).cases["hap"].config


def test_what_others_reported_is_read(tmp_path):
    spec = load(tmp_path, SPEC + REPORTED + '\n[cases.more]\nlike = "hap"')
    greg, hrank = spec.reported
    assert (greg.method, greg.model, greg.data) == ("GReg-1", "ResNet56", "CIFAR-10")
    assert (greg.dense, greg.accuracy, greg.params_pruned, greg.macs_pruned) == (93.36, 93.2, 49.82, 50)
    assert (hrank.params_pruned, hrank.macs_pruned, hrank.note) == (None, None, None)
    assert load(tmp_path).reported == ()


@pytest.mark.parametrize(
    ("old", "new", "mistake"),
    [
        ("\naccuracy = 93.2\n", "\n", "reported[1].accuracy: is required"),
        (
            "dense = 93.26",
            "dense = 100.1",
            "reported[2].dense: Input should be less than or equal to 100 (found 100.1)",
        ),
        ("accuracy = 93.17", "accuracy = -1", "reported[2].accuracy: Input should be greater than or equal to 0"),
        ("macs_pruned = 50", "macs_pruned = 200", "reported[1].macs_pruned: Input should be less than"),
        ("params_pruned = 49.82", "params_pruned = '49'", "reported[1].params_pruned: Input should be a valid number"),
        ('source = "arXiv 2012.09243, table 1"', "", "reported[1].source: is required"),
        ('source = "arXiv 2012.09243, table 1"', 'source = " "', "reported[1].source: String should have at least 1"),
        ("macs_pruned = 50", "flops_pruned = 50", "reported[1].flops_pruned: unknown field (found 50)"),
    ],
)
def test_a_reported_row_that_makes_no_sense_is_a_mistake(tmp_path, old, new, mistake):
    assert old in REPORTED
    with pytest.raises(HapError) as caught:
        load(tmp_path, SPEC + REPORTED.replace(old, new, 1))
    assert f"table.toml: {mistake}" in str(caught.value)


def test_a_reported_row_cannot_be_claimed(tmp_path):
    with pytest.raises(HapError, match=r"claims\[1\].case: must be a case of this spec, one of hap, random"):
        load(tmp_path, changed(CASE, 'case = "GReg-1"\nmetric') + REPORTED)


def test_committed_evidence_belongs_to_the_cases_of_today():
    """By folder and by what the records say of their case: a change that moves a key must take its evidence along."""
    cases = {
        (spec.name, f"{case.name}-{case.key}"): case
        for spec in map(load_spec, find_specs(ROOT / "reproductions"))
        for case in spec.cases.values()
    }
    records = sorted((ROOT / "results").glob("*/*/seed*.json"))
    assert len(records) > 200
    for file in records:
        case = cases[file.parts[-3], file.parts[-2]]
        assert json.loads(file.read_text())["config"] == case.config


SHRUNK = """
[cases.many]
like = "hap"
task = {use = "fakes:shrinkable_task", width = 8}
score = {use = "fakes:score", curvature = "hutchinson", probes = 300}
reference = {use = "fakes:score", curvature = "hutchinson"}
finetune = {epochs = 9, lr = 0.1, warmup_epochs = 3, nesterov = true}

[cases.thorough]
like = "hap"
score = {use = "fakes:open_score", probes = 9}
finetune = {epochs = 9, lr = 0.1, warmup_epochs = 0.5}

[cases.mine]
like = "hap"
method = "fakes:probing_method"
implant = false
finetune = false

[cases.small]
like = "hap"
score = {use = "fakes:score", probes = 1}
finetune = {epochs = 1, lr = 0.1}

[cases.exact]
like = "small"
score = {use = "fakes:score", probes = 300}
"""


def test_a_case_under_smoke_is_small_in_every_stage(tmp_path):
    cases = load(tmp_path, SPEC + SHRUNK).cases
    many, thorough, mine, small = (smoke(cases[name]) for name in ("many", "thorough", "mine", "small"))
    assert many.task == Ref(use="fakes:shrinkable_task", options={"width": 8, "smoke": True})
    assert many.finetune == Recipe(epochs=1, lr=0.1, warmup_epochs=1, nesterov=True)
    fewer = {"curvature": "hutchinson", "probes": 2}  # 3 is the default
    assert many.score == many.reference == Ref(use="fakes:score", options=fewer)
    assert (many.name, many.spec, many.budget, many.implant) == ("many", "table", *_kept(cases["many"]))
    assert thorough.task == Ref(use="fakes:task", options={"width": 8})  # it cannot be made small
    assert thorough.score == Ref(use="fakes:open_score", options={"probes": 2})
    assert thorough.finetune == Recipe(epochs=1, lr=0.1, warmup_epochs=0.5)
    assert (mine.method, mine.finetune) == (Ref(use="fakes:probing_method", options={"probes": 2}), None)
    assert small.score == Ref(use="fakes:score", options={"probes": 1})
    assert smoke(cases["exact"]).score == cases["exact"].score  # the closed form draws no probe


def _kept(case):
    return case.budget, case.implant


def test_a_case_under_smoke_has_its_own_key_unless_nothing_changed(tmp_path):
    cases = load(tmp_path, SPEC + SHRUNK).cases
    same = {name for name, case in cases.items() if smoke(case).key == case.key}
    assert same == {"small", "exact"}
    assert smoke(cases["small"]) == cases["small"]
    keys = [smoke(case).key for case in cases.values()]
    assert len(set(keys)) == len(keys)
    assert smoke(smoke(cases["many"])) == smoke(cases["many"])


BASES = """
[[bases]]
task = "fakes:task"
accuracy = 91.73
tolerance = 0.05
source = "a README"
"""


def test_the_published_accuracy_of_a_network_is_read_and_is_part_of_no_key(tmp_path):
    spec = load(tmp_path, SPEC + BASES)
    assert [(base.task, base.accuracy, base.tolerance) for base in spec.bases] == [("fakes:task", 91.73, 0.05)]
    assert {case.key for case in spec.cases.values()} == {case.key for case in load(tmp_path, SPEC).cases.values()}
    assert load(tmp_path, SPEC).bases == ()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"fakes:task"\nacc', '"fakes:other"\nacc', "bases[1].task: must be that of a case, one of fakes:task (found"),
        ("= 91.73", "= 191.73", "bases[1].accuracy: Input should be less than or equal to 100"),
        ("tolerance = 0.05", "", "bases[1].tolerance: is required"),
        ('source = "a README"', "", "bases[1].source: is required"),
        ("[[bases]]", "[bases]", "bases: Input should be a valid"),
    ],
)
def test_a_mistake_in_a_published_accuracy_is_told(tmp_path, old, new, told):
    assert old in BASES
    with pytest.raises(HapError) as caught:
        load(tmp_path, SPEC + BASES.replace(old, new))
    assert told in str(caught.value)


def test_looks_are_at_the_first_seeds(tmp_path):
    spec = load(tmp_path, changed("seeds = [0, 1, 2]", "seeds = {looks = [3, 6, 12]}"))
    assert (spec.seeds, spec.stops, spec.first) == (tuple(range(12)), (3, 6, 12), (0, 1, 2))
    plain = load(tmp_path)
    assert (plain.stops, plain.first) == ((3,), (0, 1, 2))
    assert spec.cases["hap"].key == plain.cases["hap"].key
    some = spec.model_copy(update={"seeds": (0, 1, 2, 3)})  # as a command does that is about some of them
    assert (some.stops, some.first) == ((3,), (0, 1, 2))
    assert spec.model_copy(update={"seeds": (7,)}).first == (7,)


def test_a_stand_in_cites_nothing_as_its_own_and_has_no_claim_of_the_paper(tmp_path):
    stands = changed("[finetune]", 'stand_in = "ResNet50"\n[finetune]').replace('"[Yu22] abstract"', '"this suite"')
    assert load(tmp_path, stands).stand_in == "ResNet50"
    with pytest.raises(HapError, match=r"claims\[1\].family: must not be that of the paper in a stand-in"):
        load(tmp_path, stands.replace('family = "sizes"', 'family = "paper"'))
