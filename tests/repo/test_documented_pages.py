"Every command line on every page is understood; test_documented_commands reads the guides, and passes over what has an ellipsis."

import inspect
import json
import re
import shlex

import pytest
from fastcore.script import anno_parser

from llmkit.cli import COMMANDS, find_command, load
from llmkit.core.errors import KitError

GROUPS = {c.rpartition(" ")[0] for c in COMMANDS}


def prose(path):
    "The Markdown of a page."
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")


def commands(text):
    "The kit's command lines in a text, and whether each stands in a block for the shell, or in a sentence."
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    shown = [s for b in blocks for s in b.replace("\\\n", " ").splitlines()]
    for line, whole in [*((s, True) for s in shown), *((s, False) for s in re.findall(r"`(llmkit [^`\n]+)`", text))]:
        for part in re.split(r"&&|\|\||[|;&]", re.sub(r"\s#.*", "", line)):
            if part.split()[:1] == ["llmkit"]:
                yield part.strip(), whole


def understood(part, whole):
    "Whether a command takes these words; in a sentence, where a value or a place may be left out, whether it has the options."
    words = shlex.split(part)[1:]
    if words[-1] == "--help" or " ".join(words) in GROUPS:
        return True
    try:
        name, rest = find_command(words)
    except KitError:
        return False
    params = inspect.signature(load(name)).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in params):
        return True
    if not whole:
        known = {f"--{p.name.replace('_', '-')}" for p in params if p.default is not p.empty}
        return known.issuperset(w for w in rest if w.startswith("--"))
    try:
        anno_parser(load(name), prog=name).parse_args(rest)
    except SystemExit:
        return False
    return True


@pytest.mark.parametrize(
    "part, whole, good",
    [
        ('llmkit monitor close NAME --because "…"', False, False),
        ('llmkit monitor close NAME "…"', False, True),
        ("llmkit judge serve 0.0.0.0 --follow", True, False),
        ("llmkit batch run --shard 3/8", False, True),
        ("llmkit rollout", False, True),
        ("llmkit rollout begin", False, False),
    ],
)
def test_what_is_understood(part, whole, good):
    assert understood(part, whole) is good


def test_every_command_on_every_page_is_understood(root, files):
    pages = files("README.md", "CONTRIBUTING.md", "nbs/*.ipynb", "examples/*.md", "benchmarks/*.md")
    found = [(f, *x) for f in pages for x in commands(prose(root / f))]
    assert len(found) > 150
    assert [(str(f), part) for f, part, whole in found if not understood(part, whole)] == []
