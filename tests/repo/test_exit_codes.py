"""What a command was given and is not there, or is not what was asked for, is wrong usage in every command: exit code 2.

1 is what a check found in the right thing, and 4 that a verdict could not be reached: a script that misspells a folder must
not be told that a bundle was tampered with.
"""

import shutil
from pathlib import Path

import pytest

from llmkit.cli import COMMANDS, find_command, main

ROOT = Path(__file__).parents[2]
FOLDERS = """
runs --project {}
repro --project {}
stage base --project {}
retrain x.jsonl --project {}
records sync --project {}
records check --project {}
records verify --project {}
dag write --project {}
dag check --project {}
doctor --project {}
params check --project {}
gate run --reports {}
gate run --reports name={}
gate run --baseline FOLDER --reports {}
gate plan --reports {}
gate selftest --reports {}
baseline set --report {} --to out
eval safety --engine {}
data diff {} {}
tokenizer lint {}
bundle verify {}
bundle sign {} --key x
lineage --folder {}
smoke {}
ask {} hello
register --folder {}
harness arc_easy --model {}
tradeoff --model {} --dataset {}
load {}
serve --target {}
batch run x.jsonl out --target {}
stream run FOLDER out --target {}
edge write {} out
image write {} out
image build {} tag
"""  # each of a folder: not there, a file, and one that holds nothing of the kind
FILES = """
retrain {}
eval {}
eval task --engine FOLDER --params {}
gate run --policy {}
gate plan --policy {}
gate selftest --policy {}
smoke x --questions {}
serve --target x --policy {}
approve r --model m --settings {}
card check --file {}
releases --model m --settings {}
releases --last {}
register --settings {}
ledger verify --path {}
serve --settings {}
rollout plan 100 --policy {}
rollout start --model m --settings {}
rollout start --receipt {}
rollout status --settings {}
rollout pause --settings {}
rollout resume --settings {}
rollout promote --settings {}
rollout abort --settings {}
rollout retry --settings {}
rollout undo --settings {}
monitor check {} --reference x.jsonl
monitor traffic --settings {}
monitor run --policy {}
monitor run --settings {}
monitor watch --settings {}
monitor status --policy {}
monitor status --settings {}
monitor close x y --settings {}
dash --settings {}
alerts write out --policy {}
judge serve --settings {}
stream run FOLDER out --settings {}
keys create me --settings {}
keys list --settings {}
keys revoke x --settings {}
keys rotate x --settings {}
export argo out w r --params {}
"""  # each of a file: not there, and a folder
NAMES = """
stage nope
eval nope
runs --id nope
repro nope
keys revoke nope
keys rotate nope
rollout start --model nope
rollout status --id nope
rollout pause --id nope
monitor close nope why
gate nope
gate run --polcy params.yaml
lineage elsewhere
image build bundle tag --tag tag
"""
LEFT = {"canaries plant", "batch ray"}  # the first names nothing, the second needs Ray
CASES = [
    (words.strip(), kind)
    for table, kinds in ((FOLDERS, ("nowhere", "file", "folder")), (FILES, ("nowhere", "folder")))
    for words in table.strip().splitlines()
    for kind in kinds
]


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project that nobody has run, with a file that holds nothing, and a folder."
    for name in ("params.yaml", "settings.ini"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nbs/pipeline", tmp_path / "nbs/pipeline")
    shutil.copytree(ROOT / "llmkit/stages", tmp_path / "llmkit/stages")
    for name in ("file", "x.jsonl"):
        (tmp_path / name).write_text('{"a": 1}\n')
    (tmp_path / "folder/sub").mkdir(parents=True)
    (tmp_path / "folder/x.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_is_asked():
    asked = {find_command(words.split())[0] for words, _ in CASES}
    assert set(COMMANDS) - asked == LEFT


@pytest.mark.parametrize("words, kind", CASES)
def test_what_is_not_there_or_not_of_the_kind_is_wrong_usage(project, capfd, words, kind):
    assert main([w.format(kind).replace("FOLDER", "folder") for w in words.split()]) == 2
    said = capfd.readouterr()
    assert kind in said.err and "Traceback" not in said.err, said


@pytest.mark.parametrize("words", NAMES.strip().splitlines())
def test_a_name_that_nothing_has_is_wrong_usage(project, capfd, words):
    assert main(words.split()) == 2
    said = capfd.readouterr()
    assert said.err and not said.out and "Traceback" not in said.err, said
