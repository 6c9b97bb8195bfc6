"A batch on a real Ray: a worker that is killed is replaced, and every line is answered once."

import json
import os
import sys
import threading
from pathlib import Path

import pytest
from serve_server import PATIENCE, process, until

EXTRA = str(Path(sys.prefix) / "extras" / "ray")  # a folder of its own: Ray is not in the lock
sys.path.append(EXTRA)
ray = pytest.importorskip("ray", reason="`make extras` brings Ray")

from llmkit.serve.batch_ray import batch_ray  # noqa: E402


def workers():
    "The processes of this one that answer a part."
    psutil = pytest.importorskip("psutil")
    found = []
    for p in psutil.Process().children(recursive=True):
        try:
            found += [p] if " ".join(p.cmdline()).startswith("ray::run_part") else []
        except psutil.Error:  # it has just ended
            continue
    return found


def test_each_line_once_although_a_worker_is_killed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", EXTRA + os.pathsep + os.environ.get("PYTHONPATH", ""))
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    n, killed = 300, []
    lines = [
        {
            "custom_id": f"q{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": f"fee {i}", "max_tokens": 8},
        }
        for i in range(n)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nnonsense\n")

    def kill():
        begun = lambda: sum(p.read_bytes().count(b"\n") for p in tmp_path.glob("*.part-*")) > 20 and workers()
        until(begun, "some answers")
        victim = workers()[0]
        victim.kill()
        killed.append(victim.pid)

    with process(tmp_path, pause=0.005) as (_, url):
        thread = threading.Thread(target=kill)
        thread.start()
        assert batch_ray("in.jsonl", "out.jsonl", shards=2, cpus=0.5, target=f"{url}/v1") == 1
        thread.join(PATIENCE)
    assert killed, "a worker died in the middle"
    answers = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(a["custom_id"] for a in answers) == sorted(f"q{i}" for i in range(n))
    assert len((tmp_path / "out.jsonl.errors.jsonl").read_text().splitlines()) == 1
    assert not list(tmp_path.glob("*.part-*"))
