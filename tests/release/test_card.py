"""No number of a card survives an edit, and no number gets in without a report."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from release_road import run_card

from llmkit.core.artifact import build, open_artifact
from llmkit.core.errors import KitError
from llmkit.core.files import write_text
from llmkit.core.report import read_report, write_report
from llmkit.release.card import card_faults, check_card

CARD = "artifacts/card/card/model_card.md"


def text_of():
    return Path(CARD).read_text(encoding="utf-8")


def test_the_card_holds_and_comes_twice_the_same(carded, capsys):
    assert check_card(CARD) == 0
    assert "every number has its evidence" in capsys.readouterr().out
    first = open_artifact("artifacts/card/card")
    assert run_card().digest == first.digest
    assert first.parents["bundle"] == open_artifact("artifacts/package/bundle").digest


def test_all_sections_are_there_and_filled(carded):
    text = text_of()
    titles = re.findall(r"^## (.+)$", text, re.M)
    wanted = [
        "Intended use",
        "Data",
        "Training",
        "Results",
        "Parity",
        "Calibration",
        "Speed",
        "Size",
        "Cost",
        "Verdict",
    ]
    assert titles == [*wanted, "Limits", "Lineage", "How to reproduce", "Evidence"]
    assert "`group=over_60`" in text and "`latency_p95`" in text and "### `merged-onnx`" in text
    assert "graph LR" in text and "missing" not in text
    assert "accuracy is 0.92" in text


def test_the_hub_reads_the_head_and_finds_the_measured_values(carded):
    from huggingface_hub import ModelCard

    data = ModelCard(text_of()).data
    found = {r.metric_type: r.metric_value for r in data.eval_results}
    report = read_report("artifacts/evaluate/report/engine")
    assert found == {"accuracy": report.get("accuracy").value}
    assert data.to_dict()["model-index"][0]["name"] == "bank-support"
    assert (data.license, data.language, data.pipeline_tag) == ("apache-2.0", "en", "text-generation")


def test_every_single_number_is_guarded(carded):
    text = text_of()
    body = text.partition("\n## Evidence\n")[0]
    spots = [m for m in re.finditer(r"\[((?:\\.|[^\]\\])*)\]\(#e\d+\)", body)]
    assert len(spots) > 30
    for m in spots:
        lie = text[: m.start(1)] + m[1] + "9" + text[m.end(1) :]
        assert card_faults(lie), m[0]
    for m in re.finditer(r'^\| <a id="e\d+"></a>\d+ \| (.*?) \| `', text, re.M):
        assert card_faults(text[: m.end(1)] + "9" + text[m.end(1) :]), m[0]
    for m in re.finditer(r"^    - .*?value: ([\d.]+)$", text, re.M):
        assert card_faults(text[: m.start(1)] + "0.99" + text[m.end(1) :]), m[0]


def test_every_typed_number_is_found(carded):
    text = text_of()
    for title in ("Data", "Training", "Results", "Parity", "Calibration", "Speed", "Cost", "Verdict"):
        lie = text.replace(f"## {title}\n", f"## {title}\n\nIt is 99 percent right.\n", 1)
        assert any("99 percent" in f for f in card_faults(lie)), title


@pytest.mark.parametrize("said", ["Accuracy is 99.7 % on every bank.", "`accuracy 0.997`", "```\naccuracy 0.997\n```"])
def test_what_people_write_holds_no_number_either(carded, said):
    text = text_of()
    for title in ("Intended use", "Results", "Limits", "Lineage", "How to reproduce"):
        lie = text.replace(f"## {title}\n", f"## {title}\n\n{said}\n", 1)
        assert any("99" in f and f.startswith(f"without evidence: {title}") for f in card_faults(lie)), title


def test_a_report_that_was_measured_again_makes_the_card_stale(carded):
    report = read_report("artifacts/evaluate/report/engine")
    write_report(report, "artifacts/evaluate/report/engine")
    assert check_card(CARD) == 0
    from dataclasses import replace

    first, *rest = report.measurements
    write_report(replace(report, measurements=(replace(first, value=0.5), *rest)), "artifacts/evaluate/report/engine")
    found = card_faults(text_of())
    assert any("the document was made from" in f for f in found) and any(f.startswith("head:") for f in found)


@pytest.mark.parametrize(
    "words, fault",
    [
        ({"metrics": ["accuracy", "bleu"]}, "bleu on all was not measured"),
        ({"summary": "Beats others by 7 points."}, "without evidence: top: Beats others by 7"),
        ({"limits": ["Right in 9 of 10 cases"]}, "without evidence: Limits: - Right in 9 of 10"),
        ({"licence": "Do as you like"}, "no licence identifier"),
        ({"language": "English"}, "no language code"),
        ({"intended_use": "<script>alert()</script>"}, "not self-contained"),
    ],
)
def test_words_cannot_bring_in_what_the_card_must_not_hold(carded, words, fault):
    before = open_artifact("artifacts/card/card").digest
    with pytest.raises(KitError, match=fault):
        run_card(**words)
    assert open_artifact("artifacts/card/card").digest == before


def test_an_inconsistent_family_is_refused_when_a_source_is_gone(carded):
    import shutil

    shutil.rmtree("artifacts/quantize/report/merged-onnx")
    with pytest.raises(KitError, match="changed since it was made"):
        run_card()


class Collector(HTMLParser):
    "Tags, references and anchors of a page."

    def __init__(self):
        super().__init__()
        self.tags, self.links, self.ids = [], set(), set()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.links |= {found[k] for k in ("href", "src", "xlink:href") if found.get(k)}
        self.ids |= {found["id"]} if "id" in found else set()


def test_the_page_stands_alone(carded):
    html = Path("artifacts/card/card/model_card.html").read_text(encoding="utf-8")
    page = Collector()
    page.feed(html)
    assert all(link.startswith("#") for link in page.links), page.links
    assert {link[1:] for link in page.links} <= page.ids
    assert page.tags.count("figure") == 6 and "script" not in page.tags
    assert "graph LR" not in html and str(Path.cwd()) not in html
    assert len(html) < 300_000


def test_own_template_with_an_unresolved_field(carded):
    from llmkit.release.evidence import Evidence
    from llmkit.release.template import fill

    evidence = Evidence({"engine": "artifacts/evaluate/report/engine"})
    for wrong in ("{{ metric('engine/f2') }}", "{{ metric('engin/accuracy') }}", "{{ nothing }}", "{% if %}"):
        with pytest.raises(KitError):
            fill(wrong, evidence, {})


def test_a_card_without_its_evidence_is_no_card(carded, capsys):
    write_text("bare.md", text_of().partition("\n## Evidence\n")[0])
    with pytest.raises(KitError, match="no evidence"):
        check_card("bare.md")
    with build("elsewhere", "card") as folder:
        write_text(folder / "model_card.md", text_of())
    assert check_card("elsewhere/model_card.md", root="artifacts") == 1


def lies(text):
    "Edits that leave each number and its link as they are, by name."
    row = next(x for x in text.splitlines() if x.startswith("| `accuracy` | ["))
    cells = row.split("|")
    swapped = "|".join([*cells[:2], cells[6], *cells[3:6], cells[2], *cells[7:]])
    cited = next(x for x in text.splitlines() if x.endswith("| `engine/accuracy` |  |"))
    return {
        "a section behind the evidence": text + "\n## News\n\nIt is 99.7 % right.\n",
        "a heading that hides what follows": text.replace("## Limits\n", "## Evidence\n\n## Limits\n\n99.7 %.\n"),
        "two subjects exchanged": text.replace(row, swapped),
        "another name for a row": text.replace(row, row.replace("`accuracy`", "`exact_match`")),
        "a line of the evidence twice": text.replace(cited, cited.replace("0.920", "0.990") + "\n" + cited),
        "a diagram that says a number": text.replace("graph LR\n", 'graph LR\n  x["99.7 percent right"]\n'),
        "another metric in the head": text.replace("type: accuracy", "type: f1"),
        "a number in the head": text.replace("license: apache-2.0", "license: apache-2.0\naccuracy: 0.997"),
    }


def test_a_number_in_a_place_that_is_not_its_own_is_found(carded):
    assert card_faults(text_of()) == []
    for name, lie in lies(text_of()).items():
        assert lie != text_of() and card_faults(lie), name


def test_the_page_is_checked_with_the_card(carded, capsys):
    page = Path(CARD).with_suffix(".html")
    page.write_text(page.read_text().replace("0.920", "0.990"))
    assert check_card(CARD) == 1
    assert "model_card.html differs" in capsys.readouterr().out


def test_the_commands_of_a_card_are_ones_that_the_kit_understands(carded, capsys):
    from llmkit.cli import main

    commands = re.findall(r"^llmkit ([^#\n]+)", text_of(), re.M)
    assert len(commands) == 2 and [main(c.split()) for c in commands] == [0, 0], capsys.readouterr().err
