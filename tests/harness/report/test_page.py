"""The page as a parser reads it, and as a browser shows it; the latter skips where there is no Chromium."""

import json
import re
import shutil
import time
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fakes import REPORTED, SPEC, fake_run, unpadded, with_accuracy, write_spec
from records import headed

from hap.harness.records import store
from hap.harness.report import page, plots
from hap.harness.report import write as report
from hap.harness.report.verdicts_md import Entry, summary
from hap.harness.spec.spec import load_spec
from hap.harness.verdicts.judge import Verdict

pytest.importorskip("altair", reason="altair is not installed: the page has no plots")
pytest.importorskip("vl_convert", reason="vl-convert-python is not installed: the page has no plots")

COMMITTED = Path(__file__).parents[3] / "results" / "index.html"
NASTY = (
    """</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2"> & "q" 'q' <!-- {{ 7 * 7 }}"""
)
BUDGETS = SPEC.replace("params = 0.7", "params = [0.3, 0.5, 0.7]").replace('case = "hap"', 'case = "hap@70"')
BUDGETS = BUDGETS.replace('against = "random"', 'against = "random@70"')


class Elements(HTMLParser):
    """Every element with its attributes, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.found, self.scripts, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.found and self.found[-1][0] == "script" and self.lasttag == "script" and self.cdata_elem == "script":
            self.scripts.append((self.found[-1][1], data))
        else:
            self.words.append(data)


class Odd(Verdict):
    """A verdict of a judge to come."""

    outcome = property(lambda self: "ODD <1>", lambda self, value: None)


def made(tmp_path, text=BUDGETS, **changes):
    """A spec with records of all cases but those of one method's last budget."""
    spec = load_spec(write_spec(tmp_path, text))
    for case in list(spec.cases.values())[:-1]:
        cost = fake_run(case, 0).cost
        left = 1 - case.budget.params
        cost = cost | {"pruned": cost["pruned"] | {"params": round(1000 * left), "macs": round(5000 * left)}}
        plan = {"rows": {"conv": "#o--", "blocks.0": "##--" if case.name.startswith("hap") else "#---", "fc": "####"}}
        for seed in spec.seeds:
            accuracy = 90 + seed + 5 * left - 4 * case.name.startswith("random")
            run = with_accuracy(fake_run(case, seed, cost=cost, plan=plan, **changes), "selected", accuracy)
            store.save(run, tmp_path / "results")
    return tmp_path / "results"


def written(tmp_path, results):
    """The page of the specs of a folder."""
    return page.write(report.entries(tmp_path / "reproductions", results), results).read_text()


def test_the_verdicts_come_first_and_then_each_spec_with_its_parts(tmp_path):
    results = made(tmp_path)
    text = written(tmp_path, results)
    places = [
        text.index(part)
        for part in ('<table id="claims">', '<section class="spec" id="table"', ">Claims<", ">Numbers<")
    ]
    places += [text.index(part) for part in (">What was pruned<", ">Where the records were made<")]
    assert places == sorted(places)
    assert '<li><span class="badge" data-outcome="HOLDS">HOLDS</span> 1</li>' in text
    assert '<a href="#table-1">more than 70 % of the parameters go</a>' in text
    assert "nox -s reproduce -- table" in text
    assert "nox -s figures -- table" in text
    assert "digits, sha256" not in text  # official or not is always said
    assert "digits (official), sha256 1111111111111111" in text
    assert "conv: 50 % dropped, 25 % implants" in text
    assert "hap@30: 33 % dropped, 8 % implants" in text
    assert text == written(tmp_path, results)


def test_the_environment_is_that_of_the_records(tmp_path):
    where = {"python": "3.12.1", "torch": "2.11", "device": "NVIDIA <H100>", "threads": 4, "packages": {"numpy": "2.0"}}
    copy = {"name": "cifar10", "sha256": "2" * 64, "official": False, "note": "from a mirror"}
    code = {"commit": "0123456789abcdef", "dirty": True, "sha256": "f" * 64}
    text = written(tmp_path, made(tmp_path, environment=where, data=copy, code=code))
    row = text[text.index(">Where the records were made<") :]
    for told in ("cifar10 (UNOFFICIAL copy), sha256 2222", "NVIDIA &lt;H100&gt;, 4 threads", "0123456789 with changes"):
        assert told in row
    assert "python 3.12.1, torch 2.11, numpy 2.0" in row
    machine = {"processor": "EPYC", "instructions": "AVX2", "driver": "580.1", "cuda": "13.2", "cudnn": "92600"}
    text = written(tmp_path, made(tmp_path, environment={**where, "machine": machine}, data=copy, code=code))
    assert "NVIDIA &lt;H100&gt;, EPYC, driver 580.1, cuda 13.2, cudnn 92600, 4 threads" in text
    assert '<td class="number">15</td>' in row


def test_text_of_a_spec_is_text_everywhere(tmp_path):
    """In elements, in attributes and within the data of a script."""
    quoted = json.dumps(NASTY)
    text = BUDGETS.replace('"A made-up table"', quoted).replace('"more than 70 % of the parameters go"', quoted)
    text = text.replace('"[Yu22] abstract"', quoted) + REPORTED.replace('"HRank"', quoted).replace('"GReg-1"', quoted)
    found = Elements(written(tmp_path, made(tmp_path, text, environment={"device": NASTY})))
    assert len([tag for tag, _ in found.found if tag == "script"]) == 3  # data, library, ours
    assert not [tag for tag, attributes in found.found if tag == "img" or "onerror" in attributes]
    (data,) = [json.loads(body) for attributes, body in found.scripts if attributes.get("class") == "plot-data"]
    assert NASTY in data["datasets"]["published"][0]["told"]
    assert NASTY in "".join(found.words)
    assert [attributes["data-text"] for _, attributes in found.found if NASTY in attributes.get("data-text", "")]


def test_plots_have_each_case_seed_and_record(tmp_path):
    results = made(tmp_path, BUDGETS + REPORTED)
    (entry,) = report.entries(tmp_path / "reproductions", results)
    found = plots.tradeoff(entry.spec, entry.runs)
    seeds, means = found["datasets"]["seeds"], found["datasets"]["means"]
    assert len(seeds) == 2 * 5 * 3
    assert len(means) == 2 * 5
    assert all((results / row["record"]).is_file() for row in seeds)
    assert all((results / row["record"]).is_dir() for row in means)
    row = next(row for row in means if (row["case"], row["stage"]) == ("hap@70", "selected"))
    assert (row["value"], row["params"], row["seeds"]) == (92.5, 30.0, "0, 1, 2")
    assert (row["low"], row["high"]) == pytest.approx(
        (92.5 - 2.48414, 92.5 + 2.48414), abs=1e-4
    )  # t(0.975, 2) / sqrt(3)
    published = found["datasets"]["published"]
    assert (published[0]["params"], published[0]["macs"]) == (pytest.approx(50.18), 50)
    assert "params" not in published[1]
    shown = [tip["field"] for tip in found["charts"]["params"]["layer"][4]["encoding"]["tooltip"]]
    assert {"case", "seeds", "record", "value", "params", "macs"} <= set(shown)
    assert plots.tradeoff(entry.spec, {}) is None


def test_colours_come_back_with_another_shape(tmp_path):
    heirs = "".join(
        f'[cases.m{n}]\nlike = "hap"\nscore = {{use = "fakes:score", probes = {n}}}\n' for n in range(1, 30)
    )
    spec = load_spec(write_spec(tmp_path, SPEC.split("[[claims]]")[0] + heirs))
    found = plots.tradeoff(spec, {name: [fake_run(case, 0)] for name, case in spec.cases.items()})
    marks = found["charts"]["macs"]["layer"][3]["encoding"]
    pairs = zip(marks["color"]["scale"]["range"], marks["shape"]["scale"]["range"], strict=True)
    assert len(set(pairs)) == len(found["methods"]) == 31
    assert marks["color"]["scale"]["domain"] == marks["shape"]["scale"]["domain"] == found["methods"]


def test_heads_are_shown_head_by_head(tmp_path):
    spec, runs = headed(tmp_path)
    entry = Entry(spec.name, spec, runs, ())
    text = page.write([entry], tmp_path).read_text()
    assert "layer 1, head 2: 1 of 2 seeds" in text
    assert "hap@25: 81 % of the heads kept" in text
    assert "Test F1 of class 1 against size" in text


def test_a_new_outcome_and_a_spec_that_does_not_read_do_not_break_the_page(tmp_path):
    (entry,) = report.entries(tmp_path / "reproductions", made(tmp_path))
    values = [{each.name: getattr(verdict, each.name) for each in fields(verdict)} for verdict in entry.verdicts]
    strange = [Odd(**{**each, "low": None}) for each in values]
    entries = [replace(entry, verdicts=tuple(strange)), Entry("broken", mistake="broken.toml: <title>: is required")]
    text = page.write(entries, tmp_path).read_text()
    assert "<option>ODD &lt;1&gt;</option>" in text
    assert '<p class="warning">Not judged. broken.toml: &lt;title&gt;: is required</p>' in text
    told = unpadded(summary(entries, tmp_path).read_text())
    assert "| **ODD &lt;1>** |" in told
    assert "| spec | HOLDS | FAILS | UNDECIDED | ABSENT | STALE | ODD &lt;1> |" in told


def test_hundreds_of_records_take_seconds_and_little_room(tmp_path):
    budgets = ", ".join(f"0.{n:02}" for n in range(11, 91, 2))
    text = SPEC.split("[[claims]]")[0].replace("params = 0.7", f"params = [{budgets}]")
    spec = load_spec(write_spec(tmp_path, text.replace("seeds = [0, 1, 2]", f"seeds = {list(range(10))}")))
    plan = {"rows": {f"layer{n}": "#-o#" * 16 for n in range(56)}}
    runs = {name: [fake_run(case, seed, plan=plan) for seed in spec.seeds] for name, case in spec.cases.items()}
    assert sum(map(len, runs.values())) == 800
    plots.library()
    start = time.process_time()
    file = page.write([Entry(spec.name, spec, runs, ())], tmp_path)
    assert time.process_time() - start < 30
    assert file.stat().st_size < 3e6


@pytest.mark.skipif(not COMMITTED.is_file(), reason="results/index.html is not committed")
def test_the_committed_page_is_small_and_names_no_machine():
    text = COMMITTED.read_text()
    assert len(text) < 3e6
    assert not re.search(r'(src|href)="(https?:)?//', text)


# in a browser


@pytest.fixture(scope="module")
def chromium():
    """A browser without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser can be driven")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("Chromium is not installed: the page is read, but not shown")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The page of a spec whose text would like to be more than text."""
    folder = tmp_path_factory.mktemp("page")
    text = BUDGETS.replace('"the suite"', json.dumps(NASTY)) + REPORTED.replace('"HRank"', json.dumps(NASTY))
    results = made(folder, text)
    write_spec(folder, "x = 1", "broken")
    written(folder, results)
    return results / "index.html"


@pytest.fixture
def opened(chromium, shown):
    """Opens the page from the disk and waits for its plots; it may complain of nothing, and ask for nothing."""
    contexts, troubles = [], []

    def show(**options):
        context = chromium.new_context(offline=True, **{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.on("request", lambda request: request.url == shown.as_uri() or troubles.append(f"asked for {request.url}"))
        tab.goto(shown.as_uri())
        tab.wait_for_selector("html[data-plots=drawn]", timeout=60_000)
        return tab

    yield show
    for context in contexts:
        context.close()
    assert troubles == []


PLACES = "(all) => all.map((each) => each.getAttribute('transform')).join()"


def rows(tab):
    """The rows of the table of claims that are seen."""
    return [row for row in tab.locator("#claims tbody tr").all() if row.is_visible()]


def test_it_opens_from_disk_without_a_word_and_runs_nothing_of_a_spec(opened):
    tab = opened()
    assert tab.locator(".plot svg").count() == 2
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("#broken .warning").inner_text().startswith("Not judged.")
    assert len(rows(tab)) == 2


def test_filters_leave_the_rows_that_fit(opened):
    tab = opened()
    tab.get_by_role("combobox", name="Verdict").select_option("ABSENT")
    assert [row.get_attribute("data-outcome") for row in rows(tab)] == ["ABSENT"]
    assert tab.locator("#shown").inner_text() == "1 of 2 claims"
    tab.get_by_role("combobox", name="Verdict").select_option("")
    tab.get_by_role("searchbox", name="Text").press_sequentially("PARAMETERS more")
    assert [row.get_attribute("data-outcome") for row in rows(tab)] == ["HOLDS"]
    tab.get_by_role("searchbox", name="Text").fill("no such words")
    assert rows(tab) == []
    tab.get_by_role("button", name="Show all").click()
    tab.wait_for_function("document.getElementById('shown').textContent === '2 of 2 claims'")
    tab.get_by_role("combobox", name="Spec").select_option("broken")
    assert rows(tab) == []


def test_the_keyboard_reaches_all_and_sees_where_it_is(opened):
    tab = opened()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert tab.locator(".skip").bounding_box()["x"] >= 0
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "verdicts"
    reached = set()
    for _ in range(12):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate("document.activeElement.id"))
    assert {"filter-outcome", "filter-spec", "filter-text"} <= reached
    assert tab.evaluate("[...document.querySelectorAll('select, input')].every((each) => each.labels.length === 1)")


def test_plots_answer_to_their_controls_and_tell_case_seeds_and_record(opened, tmp_path):
    tab = opened()
    marks = ".plot[data-size=params] svg g.mark-symbol path"
    before = tab.locator(marks).evaluate_all(PLACES)
    tab.locator("form.controls").get_by_label("Stage").select_option("one_shot")
    tab.wait_for_function(
        f"([marks, before]) => ({PLACES})([...document.querySelectorAll(marks)]) !== before", arg=[marks, before]
    )
    tab.locator("form.controls").get_by_label("Method").select_option("hap")
    tab.wait_for_function(
        "(marks) => [...document.querySelectorAll(marks)].some((e) => e.getAttribute('opacity') < 0.2)", arg=marks
    )
    tab.locator("form.controls").get_by_label("Stage").select_option("selected")
    tab.locator("form.controls").get_by_label("Method").select_option("")
    tab.wait_for_timeout(300)
    mark = tab.locator(".plot[data-size=params] svg path[aria-label*='case: hap@50'][aria-label*='interval']").first
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    tab.mouse.move(box["x"] + 1.5, box["y"] + box["height"] / 2)
    tab.wait_for_selector("#vg-tooltip-element.visible")
    told = tab.locator("#vg-tooltip-element").inner_text()
    assert re.search(r"case\s*hap@50", told)
    assert re.search(r"seeds\s*0, 1, 2", told)
    assert re.search(r"records\s*table/hap@50-[0-9a-f]{10}/", told)
    with tab.context.expect_page() as waiting:
        tab.locator(".plot[data-size=params] svg path[aria-label*='case: hap@50; seeds: 2;']").first.click()
    waiting.value.wait_for_load_state()
    assert re.search(r"/results/table/hap@50-[0-9a-f]{10}/seed2\.json$", waiting.value.url)
    assert json.loads(waiting.value.locator("body").inner_text())["seed"] == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_it_is_legible_in_light_and_dark_wide_and_narrow(opened, scheme, width, tmp_path):
    """Contrast of text and badges after WCAG 2, at least 4.5; and nothing wider than the window."""
    tab = opened(color_scheme=scheme, viewport={"width": width, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    colours = tab.evaluate(
        "['body', '.badge[data-outcome=HOLDS]', '.badge[data-outcome=FAILS]', '.badge[data-outcome=ABSENT]', "
        "'.badge[data-outcome=UNDECIDED]', 'main a', '.note']"
        ".map((each) => getComputedStyle(document.querySelector(each)).color)"
    )
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert all(contrast(colour, ground) >= 4.5 for colour in colours)
    assert (luminance(ground) < 0.1) == (scheme == "dark")
    picture = tab.screenshot(path=tmp_path / "page.png", full_page=True)
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_a_print_opens_what_is_closed_and_leaves_out_the_controls(opened):
    tab = opened(color_scheme="dark")
    closed = "document.querySelectorAll('details:not([open])').length"
    assert tab.evaluate(closed) > 0
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate(closed) == 0
    tab.emulate_media(media="print")
    assert not tab.locator("#filters").is_visible()
    assert not tab.locator("form.controls").is_visible()
    assert luminance(tab.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.9
    tab.emulate_media(media="screen")
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.evaluate(closed) > 0
    assert tab.pdf(format="A4").startswith(b"%PDF")


def luminance(colour):
    """Relative, of `rgb(r, g, b)`."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """The ratio of WCAG 2, from 1 to 21."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
