"""The report, in a real headless browser without a network."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from playwright import sync_api as browser_api

from normkit.common.style import SCRIPT
from normkit.lab.report.figures import Axis, Interval, intervals
from normkit.lab.report.page import Section, embedded, page, raw_numbers
from normkit.lab.results.store import Run, Store
from normkit.lab.results.verdict import Estimate
from normkit.lab.studies.speed import ARMS, STUDY
from normkit.lab.study import Evidence
from normkit.lab.training.config import Config
from normkit.lab.training.data import load_data
from normkit.lab.training.train import Task, train

NASTY = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1>"


EFFECTS = intervals(
    name="effects",
    title="Effects",
    caption="",
    alt="",
    rows=[Interval("after the activation: both against neither", 1, Estimate(0.9, 0.65, 1.9, 6))],
    x=Axis("ratio of steps to the target", log=True),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A small study's report, its data named so as to break out of the page if it could."""
    folder = tmp_path_factory.mktemp("report")
    config = Config(steps=200, eval_every=10, seeds=2).resolved("speed")
    data = load_data(config)
    store = Store(folder, {"study": "speed"})
    for seed in range(2):
        for arm in ARMS:
            run, _ = store.add(arm, seed, config.identity())
            for told in train(Task(run.id, arm, seed, config, probe=STUDY.probe), data):
                store.write(told)
    runs = list(store.runs())
    by_arm = {arm.name: [run for run in runs if run.arm == arm.name] for arm in ARMS}
    findings = STUDY.judge(Evidence(config, ARMS, by_arm))
    named = replace(config, data=NASTY, model=NASTY, out=NASTY)
    other = replace(data, name=NASTY)
    section = Section(STUDY, named, other, ARMS, runs, findings, store.versions())
    store.close()
    path = folder / "report.html"
    path.write_text(page([section]), "utf-8")
    more = replace(findings, figures=[*findings.figures, EFFECTS])
    twins = [section, replace(section, study=replace(STUDY, name="twin"), findings=more)]
    many = folder / "many.html"
    many.write_text(page(twins, {"batch-size": f"12 samples don't fill a batch {NASTY}"}), "utf-8")
    return path, runs, findings, many


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no chromium; make chromium installs it")
    flags = (
        "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
        "--disable-sync --no-first-run"
    )
    with browser_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=flags.split())
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, report):
    """Open the report; return the page, what its console said and what it asked the network for."""
    contexts = []

    def open_(width=1400, scheme="light", which=0):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        tab = context.new_page()
        said, asked = [], []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(report[which].as_uri())
        tab.wait_for_selector("body[data-drawn]")
        return tab, said, asked

    yield open_
    for context in contexts:
        context.close()


@pytest.mark.parametrize(
    ("width", "scheme", "which"),
    [
        (1400, "light", 0),
        (1400, "dark", 0),
        (390, "light", 0),
        (1400, "light", 3),
        (390, "dark", 3),
    ],
)
def test_it_opens_offline_without_a_word_on_the_console(opened, width, scheme, which):
    tab, said, asked = opened(width, scheme, which)
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    # Nothing is wider than the page.
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    titles = "[...document.querySelectorAll('.xtitle')].map(t => t.getBoundingClientRect().right)"
    assert 0 < max(tab.evaluate(titles)) <= width


def test_a_narrow_range_of_ratios_has_ticks_beside_1():
    assert EFFECTS.layout["xaxis"]["tickvals"] == [0.7, 1, 1.5]


def test_the_expected_traces_are_drawn(opened, report):
    tab, _, _ = opened()
    drawn = "document.getElementById('plot-speed-accuracy').data"
    lines = tab.evaluate(f"{drawn}.filter(t => t.meta === 'line').map(t => t.name)")
    assert lines == [arm.label for arm in ARMS]
    assert tab.evaluate(f"{drawn}.filter(t => t.meta === 'band').length") == len(ARMS)
    dots = tab.evaluate(f"{drawn}.filter(t => t.meta === 'dot').map(t => t.x[0])")
    assert dots
    assert all(10 <= dot <= 200 for dot in dots)
    # A line for every arm and a marker for every dot are there to see, not only in the data.
    plot = "#plot-speed-accuracy .scatterlayer"
    assert tab.locator(f"{plot} .point").count() == len(dots)
    assert tab.locator(f"{plot} path.js-line").count() == len(ARMS)
    names = tab.evaluate("document.getElementById('plot-speed-percentiles').data.map(t => t.name)")
    wanted = [f"{share}th percentile" for share in (85, 50, 15)] * 2
    assert names == wanted


def test_hover_shows_the_values(opened):
    tab, _, _ = opened()
    plot = tab.locator("#plot-speed-accuracy")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    point = tab.locator("#plot-speed-accuracy .scatterlayer .point").first.bounding_box()
    assert box["x"] < point["x"] < box["x"] + box["width"]
    tab.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    label = tab.locator("#plot-speed-accuracy .hoverlayer .hovertext")
    label.first.wait_for()
    assert re.search(r"target after \d+ steps", label.first.text_content())


def test_dark_and_light_differ_and_a_change_is_followed(opened):
    tab, _, _ = opened(scheme="light")
    style = "getComputedStyle(document.body).backgroundColor"
    drawn = "document.getElementById('plot-speed-accuracy').data"
    colour = f"{drawn}.find(t => t.meta === 'line').line.color"
    light = tab.evaluate(style), tab.evaluate(colour)
    tab.emulate_media(color_scheme="dark")
    tab.wait_for_function(f"{colour} !== '{light[1]}'")
    assert tab.evaluate(style) != light[0]


def test_the_users_strings_are_text_and_nothing_else(opened, report):
    tab, _, _ = opened()
    assert tab.evaluate("window.pwned") is None
    assert NASTY in tab.locator(".kicker").text_content()
    assert NASTY not in report[0].read_text("utf-8")


def test_the_raw_numbers_can_be_downloaded(opened, report):
    tab, _, _ = opened()
    with tab.expect_download() as download:
        tab.click("a[data-file=speed]")
    lines = Path(download.value.path()).read_text().splitlines()
    assert lines[0].startswith("arm,seed,step,status,test_accuracy,")
    assert {"p15", "train_loss", "layer 3 after p50"} <= set(lines[0].split(","))
    assert len(lines) == 1 + sum(len(run.curves["train_loss"][0]) for run in report[1])


def test_verdicts_and_table_are_there_in_words(opened, report):
    tab, _, _ = opened()
    findings = report[2]
    said = tab.locator(".verdict").all_text_contents()
    for verdict, text in zip(findings.verdicts, said, strict=True):
        assert verdict.word in text
        assert verdict.because in text
    assert tab.locator("tbody tr").count() == len(findings.rows)
    assert tab.locator("pre").text_content().startswith("normkit study speed --data ")


def test_the_page_is_under_8_mb_with_plotly_once_and_no_outside_address(report):
    text = report[0].read_text("utf-8")
    assert len(text.encode()) < 8e6
    assert text.count("plotly.js v") == 1
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?http", text)


@pytest.mark.parametrize("width", [1400, 390])
def test_every_layers_distribution_is_drawn_in_a_panel_of_its_own(opened, width):
    tab, _, _ = opened(width)
    plot = "document.getElementById('plot-speed-distributions')"
    # No norm's three layers, and batch norm's before and after: a line and two bands in each.
    drawn = tab.locator("#plot-speed-distributions .cartesianlayer > .subplot")
    assert drawn.count() == 9
    for place in range(9):
        assert drawn.nth(place).locator("path.js-line[d]").count() == 1
        assert drawn.nth(place).locator("path.js-fill[d]").count() == 2
    domains = tab.evaluate(
        f"Object.entries({plot}._fullLayout).filter(([k]) => /^[xy]axis/.test(k))"
        ".map(([k, axis]) => [k, axis.domain])"
    )
    found = {}
    for key, domain in domains:
        found.setdefault(key[5:], {})[key[0]] = domain
    boxes = list(found.values())
    for i, one in enumerate(boxes):
        for other in boxes[i + 1 :]:
            apart = [one[a][1] <= other[a][0] or other[a][1] <= one[a][0] for a in "xy"]
            assert any(apart), (one, other)
    if width == 390:
        assert {tuple(box["x"]) for box in boxes} == {(0, 1)}
    label = tab.locator("#plot-speed-distributions").get_attribute("aria-label")
    assert "batch norm, after the norm, layer 3: 15th, 50th and 85th percentile" in label


def test_a_report_of_many_studies_is_walked_with_the_keyboard(opened):
    tab, _, _ = opened(390, which=3)
    said = []
    for _ in range(3):
        tab.keyboard.press("Tab")
        said.append(tab.evaluate("document.activeElement.textContent"))
    assert said == ["overview", "speed", "twin"]
    tab.keyboard.press("Enter")
    tab.wait_for_function("location.hash === '#twin'")
    top = "document.getElementById('twin').getBoundingClientRect().top"
    tab.wait_for_function(f"Math.abs({top}) < 60")
    # The way back stays in sight.
    assert tab.locator("nav.jump").bounding_box()["y"] == 0


@pytest.mark.parametrize("width", [1400, 390])
def test_what_was_skipped_is_in_the_table_with_its_reason(opened, width):
    tab, _, _ = opened(width, which=3)
    row = tab.locator("table.overview tbody tr").last
    assert "skipped" in row.text_content()
    reason = row.get_by_text("12 samples don't fill a batch").bounding_box()
    assert reason["x"] >= 0
    assert reason["x"] + reason["width"] <= width
    # Also where the style takes the table apart, it is one to a screen reader.
    assert tab.get_by_role("columnheader", name="Verdict").first.count() == 1
    assert tab.evaluate("window.pwned") is None


def test_many_studies_make_a_page_under_10_mb_with_plotly_once(report):
    text = report[3].read_text("utf-8")
    assert len(text.encode()) < 10e6
    assert text.count("plotly.js v") == 1


def test_embedded_json_cannot_end_its_script():
    value = {"a": "</script><!-- & \u2028"}
    text = embedded(value)
    assert "<" not in text
    assert json.loads(text) == value


def test_raw_numbers_of_a_long_study_are_thinned_to_two_megabytes():
    steps = list(range(30_000))
    values = [step / 7 for step in steps]
    curves = dict.fromkeys(("train_loss", "p15", "p50", "p85"), (steps, values))
    runs = [Run(1, "none", 0, "finished", 30_000, 1.0, 0.5, curves)]
    assert 500_000 < len(raw_numbers(runs)) < 2_100_000


def test_every_colour_is_in_both_palettes():
    for colour in range(10):
        assert SCRIPT.count(f' {colour}: "#') == 2
