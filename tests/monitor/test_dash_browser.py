"The page as its readers see it, in a real browser: a rollout changes under their eyes, nothing is cut off, nothing is run."

import pytest
from serve_server import listening, until
from telemetry_browser import browser
from telemetry_town import QUICK, needs, town, window  # noqa: F401

from llmkit.monitor.board import Reader
from llmkit.monitor.dash import make_dash
from llmkit.rollout.controller import Controller
from llmkit.serve.keys import Keys

EVIL = '<img src=x onerror="document.title=1">'


def dash(t, keys=None):
    "The address of the page."
    return listening(make_dash(Reader(str(t.folder / "settings.ini"), gate=str(t.folder / "gate")), keys))


def contrast(a, b):
    "The ratio of two colours by WCAG 2, from `rgb(…)`."

    def luminance(c):
        parts = [int(x) / 255 for x in c[c.index("(") + 1 : -1].split(",")[:3]]
        red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


COLOURS = """
return [...document.querySelectorAll('main *, header *')].filter(e => e.checkVisibility() && !e.closest('svg') &&
  [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
    let g = e; while (g && getComputedStyle(g).backgroundColor.endsWith(', 0)')) g = g.parentElement;
    return [e.innerText.slice(0, 30), getComputedStyle(e).color, getComputedStyle(g || document.body).backgroundColor]; });
"""


@needs("chromedriver", "chromium")
def test_a_rollout_changes_under_the_readers_eyes(town, tmp_path):  # noqa: F811
    with town.server() as t, dash(t) as url, browser(tmp_path) as page:
        page.size(390, 844)
        page.open(url)
        assert page.text("#rollout .headline") == "No rollout was begun."
        t.begin(section=QUICK)
        until(lambda: "Progressing" in page.text("#rollout .tag"), "the start on the page")
        until(lambda: t.store.load("r1").state.weights.get("canary") == 50, "the canary")
        window(t.folder, "fail")
        Controller(t.store, "r1", t.registry).command("pause", "ann", EVIL)
        until(lambda: "Paused" in page.text("#rollout .tag"), "the pause on the page")
        assert EVIL in page.text("#rollout .headline") and page.run("return document.title") != "1"
        assert "calibration: evidence" in page.text("#drift") and "drifted" in page.text("#drift")
        page.run("document.getElementById('past').open = true")
        Controller(t.store, "r1", t.registry).command("resume", "ann", "seen")
        until(lambda: t.ask("my card is gone").status_code and t.phase() == "Degraded", "the abort")
        until(lambda: "Degraded" in page.text("#rollout .tag"), "the abort on the page")
        assert page.run("return document.getElementById('past').open"), "what was opened stays open"
        assert "canary" in page.text("#traffic table") and "baseline 100 %" in page.text("#rollout .key")
        for width in (390, 1280):
            for dark in (False, True):
                page.size(width, 844, dark)
                assert page.run("return document.documentElement.scrollWidth") <= width
                poor = [(x, round(contrast(a, b), 2)) for x, a, b in page.run(COLOURS) if contrast(a, b) < 4.5]
                assert not poor
        assert page.run("return document.querySelectorAll('main img, main script, [style]').length") == 0
        assert page.complaints() == []


@needs("chromedriver", "chromium")
def test_with_keys_nothing_is_shown_without_one(town, tmp_path):  # noqa: F811
    keys = Keys(tmp_path / "keys.db")
    admin, user = keys.create("ops", ("admin",))[0], keys.create("app")[0]
    with dash(town, keys) as url, browser(tmp_path) as page:
        page.open(url)
        until(lambda: "key of scope admin" in page.text("form"), "the question for a key")
        assert page.run("return document.querySelector('main').innerHTML") == ""
        for key, shown in ((user, False), (admin, True)):
            page.run(
                "document.querySelector('input').value = arguments[0]; document.querySelector('button').click()", key
            )
            until(lambda shown=shown: page.text("#note").startswith("updated" if shown else "This key"), "the answer")
            assert ("No rollout was begun." in page.text("main")) == shown
        assert admin not in page.run("return document.documentElement.outerHTML")


def test_the_contrast_is_that_of_wcag():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(118, 118, 118)", "rgb(255, 255, 255)") == pytest.approx(4.54, abs=0.01)
