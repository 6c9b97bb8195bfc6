"The site is built from the notebooks without warnings, asks no other host for anything, and has no dead link."

import re
import subprocess
import sys
from html import unescape
from urllib.parse import unquote, urlsplit

import pytest

LINK = re.compile(r"""<(?:a|img|script|link|iframe)\b[^>]*?\s(?:href|src)=["']([^"']*)["']""")
NAME = re.compile(r"""\sid=["']([^"']+)["']""")


def dead_links(site):
    "Links to a file or an anchor of the site that is not there, as (page, link); Sphinx itself is told to let them pass."
    pages = {p: p.read_text(encoding="utf-8") for p in site.rglob("*.html") if "data_docs" not in p.parts}
    names = {p: {unescape(n) for n in NAME.findall(text)} for p, text in pages.items()}
    dead = set()
    for page, text in pages.items():
        for link in map(unescape, LINK.findall(text)):
            to = urlsplit(link)
            target = (page.parent / unquote(to.path)).resolve() if to.path else page
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(to.fragment)
            lost = not target.is_file() or (anchor and target in names and anchor not in names[target])
            if lost and not to.scheme and not to.netloc:
                dead.add((str(page.relative_to(site)), link))
    return sorted(dead)


def test_dead_links_are_seen(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.html").write_text(
        '<h1 id="top">b</h1><a href="../index.html">up</a> <a class="x" href="#none">no</a>'
    )
    good = '<a href="a/b.html#top">b</a> <a href="https://x.org/y">y</a> <a href="">this</a>'
    (tmp_path / "index.html").write_text(f'{good} <img src="lost.png"> <a href="a/c.html">c</a>')
    assert dead_links(tmp_path.resolve()) == [
        ("a/b.html", "#none"),
        ("index.html", "a/c.html"),
        ("index.html", "lost.png"),
    ]


@pytest.mark.slow
def test_the_site(tree):
    p = subprocess.run([sys.executable, "tools/website", "site"], cwd=tree, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout + p.stderr
    site = tree / "site"
    books = [b for b in tree.glob("nbs/*/[0-9]*.ipynb")]
    assert [b for b in books if not (site / b.relative_to(tree / "nbs").with_suffix(".html")).is_file()] == []

    foreign = re.compile(
        r"<(?:script|img|iframe)[^>]+src=.https?:|<link[^>]+(?:stylesheet|preload)[^>]+href=.https?:|@import"
    )
    assert [f.name for f in site.rglob("*.html") if "data_docs" not in f.parts and foreign.search(f.read_text())] == []

    page = (site / "02_gate/01_intervals.html").read_text()
    assert 'id="llmkit.gate.intervals.wilson"' in page, "a signature"
    assert "how many of the n" in page, "the comment on a parameter"
    assert "| hide" not in page and "default_exp" not in page, "directives are for nbdev"
    assert "<summary" in page, "sources are folded"
    assert "<math" in (site / "04_model/04_lora.html").read_text(), "formulas are MathML"
    assert dead_links(site.resolve()) == []
