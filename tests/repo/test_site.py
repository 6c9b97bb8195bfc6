"The site is built from the notebooks without warnings, and asks no other host for anything."

import re
import subprocess
import sys

import pytest


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
