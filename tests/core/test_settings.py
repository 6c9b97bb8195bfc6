"What can be set is named in one place, and the environment can say it."

import re
from pathlib import Path

import llmkit
from llmkit.core.settings import KEYS, load_settings
from llmkit.serve.events import events_file
from llmkit.serve.keys import database_path

READ = r"\b(?:conf|settings|found|load_settings\([^()]*\))(?:\.get\(|\[)\"([a-z_]+)\""


def test_the_environment_overrides_what_the_file_does_not_mention(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nport = 8000\n")
    for key in KEYS:
        monkeypatch.setenv(f"LLMKIT_{key.upper()}", f"/data/{key}")
    monkeypatch.setenv("LLMKIT_STAGE", "gate")
    conf = load_settings(tmp_path / "settings.ini")
    assert dict(conf.values) == {key: f"/data/{key}" for key in KEYS}
    assert database_path(tmp_path / "settings.ini") == Path("/data/serve_db")
    assert events_file(conf) == Path("/data/events_db")


def test_every_setting_that_is_read_is_named():
    root, read = Path(llmkit.__file__).parent, set()
    for path in root.rglob("*.py"):
        text = path.read_text()
        if "load_settings" in text or "core.settings" in text:
            read |= set(re.findall(READ, text))
        read |= set(re.findall(r"Path\(settings\.get\(\"([a-z_]+)\"", text))  # where a default is said once, for all
    assert {"serve_db", "monitor", "retrain", "ledger", "tracking_uri"} <= read
    assert not read - set(KEYS) and not (set(KEYS) - read - {"events_db", "host", "otlp_endpoint"})


def test_the_projects_file_names_every_setting_with_the_default_that_the_code_takes(tmp_path):
    root = Path(llmkit.__file__).parent
    text = re.sub(r"^# ([a-z_]+ =)", r"\1", (root.parent / "settings.ini").read_text(encoding="utf-8"), flags=re.M)
    (tmp_path / "settings.ini").write_text(text)
    said = load_settings(tmp_path / "settings.ini", environ={}).values
    assert set(said) == set(KEYS)
    taken = {}
    for path in root.rglob("*.py"):
        for key, default in re.findall(r"\.get\(\"([a-z_]+)\", \"([^\"]+)\"\)", path.read_text(encoding="utf-8")):
            if key in KEYS and default != "?":
                taken.setdefault(key, set()).add(default)
    assert {"ledger", "serve_db", "events_db", "texts_db", "rollouts", "monitor_db", "monitor", "retrain"} <= set(taken)
    assert taken == {key: {said[key]} for key in taken}
