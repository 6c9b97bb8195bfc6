"Every command that the documentation, the Makefile, the hooks and the workflows name is there."

import inspect
import json
import re
import shlex

import pytest
from fastcore.docments import docments
from fastcore.script import anno_parser

from llmkit.cli import COMMANDS, find_command, load
from llmkit.core.errors import KitError

GROUPS = {c.split()[0] for c in COMMANDS if " " in c}
DOCS = ["README.md", "CONTRIBUTING.md", "Makefile", ".pre-commit-config.yaml", ".ci/run"]


def text(path):
    "A file's text; of a notebook, the text of its cells."
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    return "\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"])


def named(source):
    "The llmkit commands (in backticks, or at the start of a line) and make targets in a text."
    kit = re.findall(r"(?:`|^\s*|entry: \S+ )llmkit ([a-z][a-z ]*[a-z])(?=[\s`<$])", source, re.M)
    return kit, re.findall(r"(?:`|^|\bci: |&& )make ([a-z0-9-]+)", source, re.M)


@pytest.fixture(scope="module")
def sources(root, files):
    return {
        f: text(root / f)
        for f in [*map(root.__class__, DOCS), *files("nbs/guides/*.ipynb", "examples/*.md", ".github/workflows/*")]
    }


def test_every_llmkit_command_exists(sources):
    found = [(f, words) for f, s in sources.items() for words in named(s)[0]]
    assert len(found) > 10
    for file, words in found:
        assert find_command(words.split())[0] in COMMANDS, f"{file} names `llmkit {words}`"


def test_every_command_that_the_code_advises_exists(root, files):
    "An error's remedy is read at three in the morning."
    found = [(f, w) for f in files("llmkit/*.py") for w in re.findall(r"`llmkit ([a-z]+(?: [a-z]+)*)", text(root / f))]
    assert len(found) > 40
    bad = []
    for file, words in found:
        try:
            find_command(words.split())
        except KitError:
            if words not in GROUPS:  # "before `llmkit rollout`" speaks of all its commands
                bad.append((file, words))
    assert bad == []


def shown(source):
    "The llmkit command lines of the shell blocks in a text, and those in backticks, each as its words."
    blocks = re.findall(r"^```sh\n(.*?)^```", source, re.M | re.S)
    lines = [s for b in blocks for s in b.replace("\\\n", " ").splitlines()] + re.findall(r"`(llmkit [^`\n]+)`", source)
    for line in lines:
        for part in re.split(r"&&|\|\||[|;&]", re.sub(r"\s#.*", "", line)):
            words = shlex.split(part)
            if words[:1] == ["llmkit"] and not re.search(r"COMMAND|…|\.\.\.|\[", part):
                yield words[1:]


def test_every_command_line_is_understood(sources):
    found = [(f, words) for f, s in sources.items() for words in shown(s) if words[-1] != "--help"]
    assert len(found) > 60
    bad = []
    for file, words in found:
        name, rest = find_command(words)
        func = load(name)
        if rest and not any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(func).parameters.values()):
            try:
                anno_parser(func, prog=name).parse_args(rest)
            except SystemExit:
                bad.append(f"{file}: llmkit {' '.join(words)}")
    assert bad == []


def test_every_make_target_exists(root, sources):
    targets = set(re.findall(r"^([a-z0-9-]+):", (root / "Makefile").read_text(), re.M))
    assert {(str(f), t) for f, s in sources.items() for t in named(s)[1] if t not in targets} == set()


def test_make_help_lists_every_target(root):
    lines = (root / "Makefile").read_text().splitlines()
    assert [s for s in lines if re.match(r"[a-z0-9-]+:", s) and " ## " not in s] == []


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_a_function_with_help(name):
    func = load(name)
    assert func.__doc__ and "\n" not in func.__doc__.strip(), "one line, which `llmkit --help` shows"
    commented = {k for k, v in docments(func).items() if v or k == "return"}
    assert set(inspect.signature(func).parameters) - commented == set(), "a comment on every parameter: its help"
