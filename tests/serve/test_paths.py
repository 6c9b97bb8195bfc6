"Where the files of a service are is said once, so that who writes and who reads cannot differ."

import re
from pathlib import Path

import pytest

import llmkit
from llmkit.monitor.board import Reader
from llmkit.rollout.commands import open_store
from llmkit.serve.keys import database_path

SOURCES = sorted(Path(llmkit.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("key", ["serve_db", "events_db", "texts_db", "rollouts"])
def test_a_default_is_spelt_in_one_module(key):
    found = [p.name for p in SOURCES for _ in re.findall(rf'get\(\s*"{key}"', p.read_text(encoding="utf-8"))]
    assert len(found) == 1, found


def test_writers_and_readers_agree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ini = tmp_path / "settings.ini"
    for text, files in (("", (".llmkit/serve.db", ".llmkit/events.db", "rollouts.db")), ("serve_db = k.db\nevents_db = e.db\nrollouts = r.db\n", ("k.db", "e.db", "r.db"))):  # fmt: skip
        ini.write_text(f"[DEFAULT]\ntracking_uri = sqlite:///m.db\n{text}")
        seen, store = Reader(str(ini)), open_store(str(ini))
        assert (database_path(ini), seen.events, seen.rollouts) == tuple(map(Path, files))
        assert seen.rollouts == store.path
