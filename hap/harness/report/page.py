"""Verdicts, tables, plots, plans and environments of all specs -> results/index.html: one file that needs no network.

Its words are in page.html, its looks in page.css, and what moves in page.js, beside this file. Jinja escapes all text.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hap.harness.processes.files import atomic_write
from hap.harness.records.record import Run
from hap.harness.report import plans as fates
from hap.harness.report import plots
from hap.harness.report.tables import METRICS, body, frame, head, notes, source
from hap.harness.report.verdicts_md import Entry, commit, commits, observed, outcomes, remark, seeds
from hap.harness.spec.spec import Spec
from hap.harness.verdicts.judge import describe

HERE = Path(__file__).parent
FATES = (("-", "dropped"), ("o", "implants"))
LAYER, HEIGHT, CELL = 10, 40, 12  # of a plan picture, in its own units


def write(entries: Sequence[Entry], results: Path) -> Path:
    """Writes results/index.html; where plots cannot be made, it says so in their place."""
    jinja = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.policies["json.dumps_kwargs"] = {"sort_keys": True, "separators": (",", ":")}
    missing = plots.missing()
    specs = [_spec(entry, bool(missing)) for entry in entries]
    drawn = any(spec["plots"] for spec in specs)
    text = jinja.get_template("page.html").render(
        specs=specs,
        outcomes=outcomes(entries),
        counts=Counter(claim["outcome"] for spec in specs for claim in spec["claims"]),
        missing=missing,
        css=Markup((HERE / "page.css").read_text()),
        js=Markup((HERE / "page.js").read_text()),
        library=Markup(plots.library() if drawn else ""),
    )
    file = results / "index.html"
    atomic_write(file, text.encode())
    return file


def _spec(entry: Entry, bare: bool) -> dict[str, Any]:
    """What the page shows of a spec."""
    shown: dict[str, Any] = {"name": entry.name, "title": entry.title, "mistake": entry.mistake, "claims": []}
    if entry.spec is None:
        return {**shown, "plots": None}
    spec, runs = entry.spec, entry.runs
    every = [run for each in runs.values() for run in each]
    table = frame(spec, runs)
    return {
        **shown,
        "about": spec,
        "claims": list(_claims(entry)),
        "records": len(every),
        "metric": METRICS[spec.metric],
        "wanted": len(spec.cases) * len(spec.seeds),
        "commits": commits(entry),
        "head": head(spec),
        "rows": list(body(spec, table)),
        "notes": [note.replace("*", "") for note in notes(spec, runs)],
        "plots": None if bare else plots.tradeoff(spec, runs),
        "plans": list(_plans(spec, runs)),
        "environments": _environments(every),
    }


def _claims(entry: Entry) -> Iterator[dict[str, Any]]:
    for number, verdict in enumerate(entry.verdicts, start=1):
        yield {
            "number": number,
            "outcome": str(verdict.outcome),
            "surprising": verdict.surprising,
            "text": f"{'stand-in: ' if verdict.stand_in else ''}{verdict.claim.text}",
            "source": verdict.claim.source,
            "claimed": describe(verdict.claim),
            "bound": f"{verdict.claim.op} {verdict.claim.value:g}"
            + (f" ± {verdict.claim.tolerance:g}" if verdict.claim.tolerance else ""),
            "observed": observed(verdict),
            "seeds": seeds(verdict),
            "remark": remark(verdict),
        }


def _plans(spec: Spec, runs: dict[str, list[Run]]) -> Iterator[dict[str, Any]]:
    """A picture for each budget of each network: its panels, and the layers that they share."""
    words = fates.budgets(spec)
    for budget in dict.fromkeys(words.values()):
        chosen = {name: each for name, each in runs.items() if words[name] == budget}
        for panels in fates.networks(chosen):
            layers = list(panels[0][1][0])
            heads = fates.head_size([plan for _, plans in panels for plan in plans]) if _headed(spec, panels) else 0
            drawn = [_heads(*panel, heads) if heads else _layers(*panel) for panel in panels]
            yield {"budget": budget, "heads": bool(heads), "layers": layers, "panels": drawn}


def _headed(spec: Spec, panels: Sequence[tuple[list[str], Any]]) -> bool:
    return all(spec.cases[name].prune == "heads" for names, _ in panels for name in names)


def _layers(cases: list[str], plans: Sequence[fates.Rows]) -> dict[str, Any]:
    """A bar a layer: what is dropped from below, implants on it."""
    dropped, implants = (fates.shares(plans, letter) for letter, _ in FATES)
    bars = []
    for place, (module, low, high) in enumerate(zip(plans[0], dropped, implants, strict=True)):
        told = f"{module}: {low:.0f} % dropped" + (f", {high:.0f} % implants" if high else "")
        down, up = HEIGHT * low / 100, HEIGHT * high / 100
        edges = {"x": place * LAYER, "down": f"{down:.3g}", "up": f"{up:.3g}", "top": f"{HEIGHT - down:.3g}"}
        bars.append({"told": told, **edges, "over": f"{HEIGHT - down - up:.3g}"})
    told = ", ".join(f"{share:.0f} % {name}" for letter, name in FATES if (share := fates.whole(plans, letter)))
    size = {"width": LAYER * len(bars), "height": HEIGHT}
    return {"cases": cases, "told": told or "all rows kept", "bars": bars, "cells": [], **size}


def _heads(cases: list[str], plans: Sequence[fates.Rows], size: int) -> dict[str, Any]:
    """A cell a head of each layer, the fuller the more seeds keep it."""
    kept = fates.heads(plans, size)
    cells = [
        {"x": CELL * place, "y": CELL * layer, "kept": f"{share:.2g}", "told": _head(layer, place, share, len(plans))}
        for layer, shares in enumerate(kept)
        for place, share in enumerate(shares)
    ]
    whole = sum(map(sum, kept)) / sum(map(len, kept))
    told = f"{100 * whole:.0f} % of the heads kept"
    return {
        "cases": cases,
        "told": told,
        "bars": [],
        "cells": cells,
        "width": CELL * max(map(len, kept)),
        "height": CELL * len(kept),
    }


def _head(layer: int, place: int, share: float, count: int) -> str:
    return f"layer {layer + 1}, head {place + 1}: {share * count:.2g} of {count} seeds"


def _environments(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The surroundings in which records were made, and how many in each, as the records tell it."""
    found = Counter(_environment(run) for run in runs)
    return [{"records": count, **dict(told)} for told, count in sorted(found.items(), key=lambda pair: pair[0])]


def _environment(run: Run) -> tuple[tuple[str, str], ...]:
    where, code = run.environment, run.code
    packages = ", ".join(f"{name} {version}" for name, version in sorted(where.get("packages", {}).items()))
    machine = where.get("machine", {})  # which records made before it was kept do without
    device = [str(where[name]) for name in ("device", "cpu") if where.get(name)]
    device += [machine["processor"]] if machine else []
    device += [f"{name} {machine[name]}" for name in ("driver", "cuda", "cudnn") if name in machine]
    threads = [f"{where['threads']} threads"] if where.get("threads") else []
    versions = [f"{name} {where[name]}" for name in ("python", "torch") if where.get(name)]
    return (
        ("data", f"{source(run.data)}, sha256 {run.data['sha256'][:16]}"),
        ("device", ", ".join([*device, *threads]) or "unknown"),
        ("versions", ", ".join([*versions, *([packages] if packages else [])])),
        ("platform", str(where.get("platform", "unknown"))),
        ("commit", commit(run)),
        ("code", str(code.get("sha256", ""))[:10]),
    )
