"""History -> the regressions of its last night, told as lines, Markdown and JUnit XML; does not know how rows are made.

Of each series two questions are asked: whether its best piecewise constant fit stepped down and stayed there, and
whether its newest N numbers are worse than the 2N before them. All answers of a night are one family, corrected by
Holm's procedure: on a night on which nothing changed, the chance of any false alarm is at most RATE, where the numbers
of a series are independent and normal. The error of a mean of nights that all share one bad hour is not in that.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from hap.harness.nightly import changepoint as detect
from hap.harness.nightly import history
from hap.harness.nightly.history import Accepted, Night, Row, Series
from hap.harness.verdicts.statistics import holm

RATE = 0.01
FEWEST = 3  # new numbers that are held against twice as many
WINDOW = 100  # nights that are looked back on


class Kind(NamedTuple):
    """How a metric is compared: which way is better, what spread is the least believed, what change the least told."""

    better: int
    floor: float
    least: float
    relative: bool = False  # then floor and least are shares


PERCENT, SHARE = Kind(1, 0.1, 0.2), Kind(1, 0.01, 0.02)
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("accuracy", "f1", "matthews", "params_pruned", "macs_pruned"), PERCENT),
    **dict.fromkeys(("spearman", "overlap"), SHARE),
    "drop": PERCENT._replace(better=-1),
    "loss": Kind(-1, 0.02, 0.05, relative=True),
    "speedup": Kind(1, 0.02, 0.05, relative=True),
    "ratio": Kind(-1, 0.02, 0.05, relative=True),
}


@dataclass(frozen=True)
class Watched:
    """What was found of one series: its levels in its own units, the corrected p, and since which night it is worse."""

    series: Series
    nights: int
    before: float
    after: float
    p: float
    asked: int  # questions: none where the history is too short
    since: Night
    last_good: Night
    worse: bool = False
    visible: float | None = None  # the least fall that is told on its first night; a share where changes are

    @property
    def line(self) -> str:
        """One line: metric, before, after, since which commit."""
        change = f"{self.before:.4g} -> {self.after:.4g}"
        if KINDS[self.series.metric].relative:
            change += f" ({100 * (self.after / self.before - 1):+.0f} %)"
        since = f"since {self.since.commit} (night {self.since.name}; before it {self.last_good.commit})"
        if self.since.torch != self.last_good.torch:
            since += f", torch {self.since.torch} (before it {self.last_good.torch})"
        return f"{self.series.name}: {change} {since}, p = {self.p:.1g}"


def watch(lines: Sequence[Row | Accepted], night: str | None = None, rate: float = RATE) -> list[Watched]:
    """Every series that has a number of the night, by default the last, judged together; regressions first."""
    last = night or next(reversed(history.nights(lines)), None)
    tonight = {each: nights for each, nights in history.series(lines).items() if nights[-1].name == last}
    asked = [_asked(each, nights[-WINDOW:]) for each, nights in tonight.items()]
    adjusted = iter(holm([p for answers in asked for p, _ in answers]))
    found = [
        replace(
            _judged(*each, answers, [next(adjusted) for _ in answers], rate),
            visible=_visible(*each, rate / max(1, sum(map(len, asked)))),
        )
        for each, answers in zip(tonight.items(), asked, strict=True)
    ]
    return sorted(found, key=lambda each: (not each.worse, each.series.name))


def markdown(found: Sequence[Watched], notes: Sequence[str], night: str) -> str:
    """The summary of a night: regressions, what was watched, at which rate of false alarms, and the notes."""
    bad = [each for each in found if each.worse]
    young = sum(not each.asked for each in found)
    parts = [f"# Night {night}", f"{_count(len(bad), 'regression')} in {len(found)} series."]
    if bad:
        head = "| series | before | after | since | before it | p |\n|---|---|---|---|---|---|\n"
        parts.append(head + "\n".join(_cells(each) for each in bad))
    parts.append(
        f"Each series is asked for a step in its fit and for its newest numbers against twice as many before; all "
        f"{sum(each.asked for each in found)} questions are corrected together (Holm). Where nothing changed, "
        f"at most {100 * RATE:g} % of nights raise any false alarm."
    )
    parts += [_seen(found)] * any(each.visible is not None for each in found)
    if young:
        parts.append(f"{young} of the series have too few nights to be asked anything.")
    return "\n\n".join([*parts, *(["\n".join(f"- {_plain(note)}" for note in notes)] if notes else [])]) + "\n"


def junit(found: Sequence[Watched], broken: Sequence[tuple[str, str]], night: str) -> bytes:
    """JUnit XML: a test case a series, with its numbers as properties, and one for each part that broke."""
    suite = ElementTree.Element("testsuite", name=f"hap nightly {night}", tests=str(len(found) + len(broken)))
    for each in found:
        case = ElementTree.SubElement(suite, "testcase", classname=each.series.spec, name=each.series.name)
        properties = ElementTree.SubElement(case, "properties")
        for name, value in _properties(each):
            ElementTree.SubElement(properties, "property", name=name, value=_clean(value))
        if each.worse:
            ElementTree.SubElement(case, "failure", message=_clean(each.line)).text = _clean(each.line)
        elif not each.asked:
            ElementTree.SubElement(case, "skipped", message=f"{_count(each.nights, 'night')}: too few to compare")
    for name, text in broken:
        case = ElementTree.SubElement(suite, "testcase", classname="nightly", name=_clean(name))
        ElementTree.SubElement(case, "error", message=_clean(text.strip().splitlines()[-1])).text = _clean(text)
    suite.set("failures", str(sum(each.worse for each in found)))
    suite.set("errors", str(len(broken)))
    suite.set("skipped", str(sum(not each.asked and not each.worse for each in found)))
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode").encode()


Answer = tuple[float, detect.Step]


def _asked(series: Series, nights: list[Night]) -> list[Answer]:
    """What can be asked of a series: p-values, and where and between which levels."""
    kind = KINDS[series.metric]
    values = [np.array([_scaled(value, kind) for value in night.values]) for night in nights]
    means = np.array([each.mean() for each in values])
    answers = list[Answer]()
    # one number a night may be an outlier, of a busy machine; the mean of several seeds is none
    shortest = 1 if len(values[-1]) > 1 else 2
    if len(means) >= detect.SHORTEST + shortest:
        level = detect.Step(len(means) - 1, float(np.median(means[:-1])), float(means[-1]), 1.0)
        step = detect.step(means, kind.floor, shortest) or level
        answers.append((step.p, step))
    new = next((i for i in range(1, len(values) + 1) if sum(map(len, values[-i:])) >= FEWEST), None)
    if new is not None:
        newest, before = np.concatenate(values[-new:]), np.concatenate([np.empty(0), *values[:-new]])
        if len(before) >= 2 * len(newest):
            before = before[-2 * len(newest) :]
            p = float(detect.reference(before, newest, kind.floor))
            answers.append((p, detect.Step(len(values) - new, float(before.mean()), float(newest.mean()), p)))
    return answers


def _judged(series: Series, nights: list[Night], answers: list[Answer], adjusted: list[float], rate: float) -> Watched:
    kind, nights = KINDS[series.metric], nights[-WINDOW:]
    p, step = min(zip(adjusted, (step for _, step in answers), strict=True), default=(1.0, _still(nights, kind)))
    before, after = (_unscaled(value, kind) for value in (step.before, step.after))
    worse = p <= rate and step.before - step.after >= (math.log1p(kind.least) if kind.relative else kind.least)
    return Watched(
        series, len(nights), before, after, p, len(answers), nights[step.at], nights[max(0, step.at - 1)], worse
    )


def _visible(series: Series, nights: list[Night], alpha: float) -> float | None:
    """The fall of the next night that `detect.step` would tell on that night, as noisy as these are."""
    from scipy.stats import t

    kind = KINDS[series.metric]
    means = np.array([np.mean([_scaled(value, kind) for value in night.values]) for night in nights[-WINDOW:]])
    n = len(means)
    if n < detect.SHORTEST or len(nights[-1].values) == 1:  # one number a night is told on its second
        return None
    error = max(float(means.std(ddof=1)), kind.floor) * math.sqrt(1 + 1 / n)
    fall = float(t.isf(alpha * detect.share(0, n, n, n + 1), n - 1)) * error
    return -math.expm1(-fall) if kind.relative else max(fall, kind.least)


def _seen(found: Sequence[Watched]) -> str:
    """What could be told: a change that is smaller takes more nights, or is never seen."""
    parts = []
    for unit, kinds in (("points", (PERCENT, KINDS["drop"])), ("correlation", (SHARE,))):
        falls = [e.visible for e in found if e.visible is not None and KINDS[e.series.metric] in kinds]
        if falls:
            parts.append(f"{np.median(falls):.2g} {unit} in the median series ({min(falls):.2g} to {max(falls):.2g})")
    return f"The smallest fall that is told on its first night: {'; '.join(parts) or 'none is watched'}."


def _still(nights: list[Night], kind: Kind) -> detect.Step:
    mean = float(np.mean([_scaled(value, kind) for value in nights[-1].values]))
    return detect.Step(len(nights) - 1, mean, mean, 1.0)


def _scaled(value: float, kind: Kind) -> float:
    """Higher is better; ratios as logarithms, for their noise is a share of them."""
    return kind.better * (math.log(max(value, 1e-12)) if kind.relative else value)


def _unscaled(value: float, kind: Kind) -> float:
    return math.exp(kind.better * value) if kind.relative else kind.better * value


def _properties(each: Watched) -> Iterator[tuple[str, str]]:
    yield from (("before", f"{each.before:.6g}"), ("after", f"{each.after:.6g}"), ("p", f"{each.p:.3g}"))
    yield from (("nights", str(each.nights)), ("since", each.since.commit), ("machine", each.series.machine))
    yield from [("visible", f"{each.visible:.3g}")] if each.visible is not None else []


def _cells(each: Watched) -> str:
    cells = (each.series.name, f"{each.before:.4g}", f"{each.after:.4g}", each.since.commit, each.last_good.commit)
    return "| " + " | ".join(map(_plain, (*cells, f"{each.p:.1g}"))) + " |"


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _clean(text: str) -> str:
    """Text without what XML cannot hold."""
    return "".join(c for c in text if c in "\t\n" or " " <= c < "\ud800" or "\ue000" <= c < "\ufffe" or c > "\uffff")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
