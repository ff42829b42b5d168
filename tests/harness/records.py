"""Specs with all their records, made up: scores with a reference, heads, plans."""

from dataclasses import replace

from fakes import SPEC, fake_run, write_spec

from hap.harness.spec.spec import load_spec


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


def planned(spec, plans, **more):
    """Records of each case with these plans, a seed each: case -> list of {module: rows}."""
    return {
        name: [fake_run(spec.cases[name], seed, plan={"rows": rows}, **more) for seed, rows in enumerate(each)]
        for name, each in plans.items()
    }
