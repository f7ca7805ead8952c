"""The page of an inspection, in a real headless browser without a network."""

import re
import shutil

import pytest
import torch
from playwright import sync_api as browser_api
from small import data, network
from torch import nn

import normkit

NASTY = "x</td><script>pwned=1</script>"


@pytest.fixture(scope="module")
def report():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(NASTY, network())
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(getattr(self, NASTY)(x))

    torch.manual_seed(0)
    return normkit.inspect(Net(), data(), lambda output, batch: output.square().mean())


@pytest.fixture(scope="module")
def tabs(report, tmp_path_factory):
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no chromium; make chromium installs it")
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(report.to_html(), "utf-8")
    flags = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
    with browser_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=flags.split())

        def open_(width, scheme):
            context = browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
            )
            tab = context.new_page()
            said = []
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.goto(path.as_uri())
            return tab, said

        yield open_
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (1400, "dark"), (390, "light")])
def test_it_opens_offline_and_fits(tabs, width, scheme):
    tab, said = tabs(width, scheme)
    assert said == []
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.evaluate("window.pwned") is None


def test_findings_and_layers_are_all_there(tabs, report):
    tab, _ = tabs(1400, "light")
    assert [f.name for f in report.rows] == ["never-updated"]
    said = tab.locator(".findings article").all_text_contents()
    for finding, text in zip(report.rows, said, strict=True):
        for part in (finding.where, finding.code, finding.measured, finding.why, finding.fix):
            assert part in text
    rows = tab.locator("#layers tbody tr")
    assert rows.count() == 3
    assert NASTY in rows.first.text_content()
    # Two histograms each, and the running means of the two batch norms.
    assert tab.locator("#layers svg").count() == 8
    assert tab.locator("#layers tr").nth(1).locator("circle").count() == 8
    heights = (
        tab.locator("#layers tr")
        .nth(1)
        .locator("rect")
        .evaluate_all("bars => bars.map(bar => +bar.getAttribute('height'))")
    )
    assert max(heights) == pytest.approx(56)


def test_it_asks_for_nothing_outside(report):
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?http", report.to_html())
