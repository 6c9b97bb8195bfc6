"The page as its readers see it, in a real browser: a rollout changes under their eyes, nothing is cut off, nothing is run."

import os
import time
from pathlib import Path

import pytest
from serve_server import listening, until
from telemetry_browser import browser
from telemetry_town import QUICK, needs, town, window  # noqa: F401

from llmkit.core.report import Measurement, Report
from llmkit.gate.verdict import RuleResult, Verdict, write_verdict
from llmkit.monitor.board import Reader
from llmkit.monitor.dash import make_dash
from llmkit.monitor.state import Action, Memory, Score, Seen
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


@needs("chromedriver", "chromium|google-chrome")
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


# Every text of the page whose place ends outside its cell, its box or the window, unless a box scrolls to it.
OUTSIDE = """
const wide = document.documentElement.clientWidth, out = [];
for (const d of document.querySelectorAll('details')) d.open = true;
for (const e of document.querySelectorAll('main th, main td, main p, main li, main h2, main h3, main svg')) {
  if (e.scrollWidth > e.clientWidth + 1 && e.clientWidth) out.push(['exceeds', e.outerHTML.slice(0, 90)]);
  const box = e.closest('.scroll'), range = document.createRange(); range.selectNodeContents(e);
  const own = e.matches('svg') ? [e.getBoundingClientRect()] : [...range.getClientRects()];
  const right = Math.max(...own.map(r => r.right)), left = Math.min(...own.map(r => r.left)), at = (box || e.closest('section')).getBoundingClientRect();
  if (e.matches('th, td') && right > e.getBoundingClientRect().right + 1) out.push(['over its neighbour', e.innerText]);
  if (left < at.left - 1) out.push(['left', e.innerText]);
  if (right > at.right + 1 && !(box && box.scrollWidth > box.clientWidth)) out.push(['right', e.innerText]);
  if (at.right > wide) out.push(['box', e.innerText]);
}
return [document.documentElement.scrollWidth, innerWidth, out,
  [...document.querySelectorAll('.scroll')].map(b => [b.getAttribute('aria-label'), b.scrollWidth - b.clientWidth])];
"""
LONG = "worst_group_hallucination_rate_of_customers_who_wrote_in_a_language_other_than_that_of_the_branch"


def crowd(folder):
    "Windows that drifted, with names that no line holds, and a verdict of the gate with long sentences."
    now, at = time.time(), "sha256:" + "a" * 64
    scores = tuple(
        Score(f, f"{LONG}_{i}", 123456.789, 0.000123, 4000, f"group={LONG}", drifted=i % 2 == 0)
        for i, f in enumerate(("data", "cost", "hallucination", "calibration", "fairness"))
    )
    rules = tuple(
        RuleResult(f"rule {i}", o, f"{LONG} is 0.123456 (95% bounds -0.0123 to +0.4567, n = 123456)", LONG, "fairness")
        for i, o in enumerate(("pass", "fail", "inconclusive", "error", "skipped"))
    )
    verdict = Verdict("error", rules, "sha256:p")
    outcomes = {s.family: "fail" if s.drifted else "inconclusive" for s in scores}
    for n in range(1, 7):
        w = Seen(at, n, 900 * n, 900 * n + 899, now - 600, now, 123456, 12345, scores, outcomes, verdict)
        asked = [Action(f"a{n}", "retrain", now, at, n, f"{LONG} drifted", "requested")]
        report = Report("window", "", "window@1", (Measurement(LONG, 0.05, 400, 0.03, 0.07, direction="lower"),))
        Memory(folder / "monitor.db").add(w, {"traffic": report}, {}, asked)
    write_verdict(verdict, folder / "gate")


@needs("chromedriver", "chromium|google-chrome")
def test_on_a_phone_nothing_is_cut_and_only_boxes_scroll(town, tmp_path):  # noqa: F811
    with town.server() as t, dash(t) as url, browser(tmp_path) as page:
        t.begin(id="promotion-of-the-quantized-release-of-november-for-all-retail-customers-of-the-bank")
        id = t.store.ids()[0]
        until(lambda: t.store.load(id).state.weights.get("canary") == 50, "the canary")
        for _ in range(8):
            t.ask()
        Controller(t.store, id, t.registry).command("pause", "ann", LONG)
        crowd(t.folder)
        page.size(390, 844)
        page.open(url)
        until(lambda: "Paused" in page.text("#rollout .tag") and LONG in page.text("#drift"), "the board")
        for width in (360, 390, 768, 1280):
            for dark in (False, True):
                page.size(width, 844, dark)
                scroll, inner, out, boxes = page.run(OUTSIDE)
                assert scroll <= inner == width and not out, (width, out[:5])
                assert not [b for b in boxes if b[1] > 0 and b[0] != "Traffic by variant"], "the other tables wrap"
                if shots := os.environ.get("LLMKIT_TEST_SHOTS"):
                    page.picture(Path(shots) / f"dash-{width}-{'dark' if dark else 'light'}.png")
        shown = {"History", "Traffic by variant", "Outcome by family", "Asked for", "Windows before"}
        assert {b[0] for b in boxes} >= shown | {"Verdict of the gate, before the release"}
        (t.folder / "gate/verdict.json").write_text("{")
        until(lambda: "Cannot be read" in page.text("#trouble"), "the trouble, with a path that no line holds")
        page.size(360, 844)
        scroll, inner, out, _ = page.run(OUTSIDE)
        assert scroll <= inner == 360 and not out, out[:5]


@needs("chromedriver", "chromium|google-chrome")
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
            until(
                lambda shown=shown: page.text("#now" if shown else "#note").startswith(
                    "As of" if shown else "This key"
                ),
                "the answer",
            )
            assert ("No rollout was begun." in page.text("main")) == shown
        assert admin not in page.run("return document.documentElement.outerHTML")


@needs("chromedriver", "chromium|google-chrome")
def test_a_page_whose_server_is_gone_says_since_when(town, tmp_path):  # noqa: F811
    with browser(tmp_path) as page:
        with dash(town) as url:
            page.open(url)
            until(lambda: page.text("#now").startswith("As of"), "the board")
            assert page.text("#now time").endswith(" UTC")
        until(lambda: page.text("#note").startswith("No news since"), "the end of the server")
        told = page.text("#note")
        assert told.startswith(f"No news since {page.text('#now time')}:")  # as all times of the page
        time.sleep(4.5)  # two looks and more
        assert page.text("#note") == told


def test_the_contrast_is_that_of_wcag():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(118, 118, 118)", "rgb(255, 255, 255)") == pytest.approx(4.54, abs=0.01)
