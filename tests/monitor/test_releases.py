"An alert names the release, whatever the metrics that tell it do: absent, of two servers, of a server that is gone."

import re
import shlex
import subprocess
import threading
from pathlib import Path

from fastcore.script import anno_parser
from serve_server import until
from telemetry_town import needs, window

from llmkit.cli import find_command, load
from llmkit.core.files import read_json, write_json
from llmkit.core.params import load_params
from llmkit.core.settings import Settings
from llmkit.monitor.alerts import alerts, rules_file
from llmkit.monitor.releases import Versions, answered
from llmkit.monitor.scrape import Windows
from llmkit.release.ledger import append
from llmkit.serve.events import KINDS, Events
from llmkit.serve.measured import Measured
from llmkit.serve.metrics import Metrics

ROOT = Path(__file__).parents[2]
FOUND = {a.name: a for a in alerts(load_params(ROOT / "params.yaml"))}


def fired(folder, tests):
    "What promtool says of tests: name of an alert, series → values, and when which annotations are told with which labels."
    bodies = []
    for name, series, minute, labels, told in tests:
        a = FOUND[name]
        expected = {"exp_labels": {"severity": a.severity, **labels}, "exp_annotations": told}
        bodies.append({
            "name": name, "interval": "15s", "input_series": [{"series": s, "values": v} for s, v in series.items()],
            "alert_rule_test": [{"eval_time": f"{minute}m", "alertname": name, "exp_alerts": [expected]}],
        })  # fmt: skip
    write_json(folder / "rules.yml", rules_file(list(FOUND.values())))
    write_json(folder / "tests.yml", {"rule_files": ["rules.yml"], "evaluation_interval": "15s", "tests": bodies})
    done = subprocess.run(["promtool", "test", "rules", "tests.yml"], cwd=folder, capture_output=True, text=True)
    return (done.stdout + done.stderr).replace("  SUCCESS", "").replace("Unit Testing:  tests.yml", "").strip()


@needs("promtool")
def test_every_alert_fires_where_nobody_says_which_release_is_meant(tmp_path):
    many = {a.name: {s: v.replace("$n", "100") for s, v in a.fires.items()} for a in FOUND.values()}
    assert fired(tmp_path, [(n, many[n], 25, a.labels, a.told(a.value)) for n, a in FOUND.items()]) == ""
    assert all("not known here" in a.told("1")["release"] for a in FOUND.values())


def info(instance, variant, release, version=""):
    return f'llmkit_release_info{{job="llmkit",instance="{instance}:1",variant="{variant}",release="{release}",version="{version}"}}'


def rollout(instance, phase, model="m", id="m-3"):
    where = f'job="llmkit",instance="{instance}:1",model="{model}",rollout="{id}",phase="{phase}"'
    return f'llmkit_rollout_info{{{where},variant="baseline",release="aaaa",version="2"}}'


@needs("promtool")
def test_a_server_that_is_gone_is_told_of_with_what_it_served_last(tmp_path):
    "A promotion a quarter of an hour before: the release before it is not named."
    where, a = {"job": "llmkit", "instance": "a:1"}, FOUND["LlmkitDown"]
    series = {
        'up{job="llmkit",instance="a:1"}': "1+0x119 0+0x80", 'up{job="llmkit",instance="b:1"}': "1+0x200",
        info("a", "baseline", "aaaa", "2"): "1+0x59 stale", info("a", "baseline", "bbbb"): "_x60 1+0x59 stale",
        info("b", "baseline", "cccc", "1"): "1+0x200", rollout("a", "Progressing"): "1+0x59 stale", rollout("a", "Healthy"): "_x60 1+0x59 stale",
    }  # fmt: skip
    back = "Rollout m-3 is Healthy; where it is the cause, llmkit rollout undo --id m-3 goes back to release aaaa (version 2)."
    told = a.told("0") | {"release": "baseline: release bbbb.", "order": back}
    assert fired(tmp_path, [("LlmkitDown", series, 45, where, told)]) == ""


@needs("promtool")
def test_servers_and_models_are_told_apart_and_those_that_say_the_same_once(tmp_path):
    two = {info(i, "baseline", "aaaa", "2"): "1+0x100" for i in "ab"} | {info("b", "canary", "bbbb", "3"): "1+0x100"}
    two |= {rollout(i, "Degraded", model, f"{model}-3"): "1+0x100" for i in "ab" for model in ("m", "other")}
    a, ready = FOUND["LlmkitErrorRate"], FOUND["LlmkitNotReady"]
    series = {s: v.replace("$n", "100") for s, v in a.fires.items()} | two
    said = {
        "release": "baseline: release aaaa (version 2). canary: release bbbb (version 3).",
        "order": "Rollout m-3 is Degraded: everybody is back at release aaaa (version 2).",
    }
    all_ = {"release": "baseline: release aaaa (version 2).", "order": f"{said['order']} {said['order'].replace('m-3', 'other-3')}"}  # fmt: skip
    where = {"job": "llmkit", "instance": "a:1"}
    down = two | {'llmkit_ready{job="llmkit",instance="a:1"}': "0+0x100"}
    tests = [
        ("LlmkitErrorRate", series, 20, a.labels, a.told(a.value) | said),
        ("LlmkitNotReady", down, 20, where, ready.told("0") | all_),
    ]
    assert fired(tmp_path, tests) == ""


def test_a_request_without_a_release_names_none(tmp_path):
    base = dict.fromkeys(KINDS["request"].split()) | {"kind": "request", "status": "ok", "variant": "baseline"}
    log = Events(tmp_path / "e.db")
    assert answered(log) == {}
    log.append(base | {"time": 1.0, "id": "a", "release": ""})  # an upstream that has none
    assert answered(log) == {}


def test_a_registry_that_hangs_or_fails_keeps_no_scrape_waiting(tmp_path, monkeypatch, caplog):
    append(tmp_path / "l.jsonl", "m", "challenger", "sha256:a", "sha256:e")
    free, asked = threading.Event(), []

    def versions(uri, model):
        asked.append(model)
        assert free.wait(10)
        raise OSError("no route")

    monkeypatch.setattr("llmkit.monitor.releases.versions", versions)
    conf = Settings("DEFAULT", {"ledger": str(tmp_path / "l.jsonl"), "tracking_uri": "http://x:1"}, tmp_path / "s.ini")
    v = Versions(conf)
    assert [v.of("sha256:a") for _ in range(3)] == [""] * 3 and v.asking.is_alive()
    free.set()
    until(lambda: "no route" in caplog.text, "the failure in the log")
    assert v.of("sha256:a") == "" and asked == ["m"]  # not again within the minute
    monkeypatch.setattr("llmkit.monitor.releases.AGAIN", 0.0)
    monkeypatch.setattr("llmkit.monitor.releases.versions", lambda uri, model: [type("V", (), {"release": "sha256:a", "version": 7})])  # fmt: skip
    v._next = 0.0
    until(lambda: v.of("sha256:a") == "7", "the version")


def test_rollouts_that_cannot_be_read_take_no_drift_away(tmp_path, caplog):
    conf = {"monitor_db": str(tmp_path / "monitor.db"), "events_db": str(tmp_path / "e.db"), "rollouts": str(tmp_path / "r.db")}  # fmt: skip
    window(tmp_path, "fail")
    (tmp_path / "r.db").write_text("no database")
    m = Metrics()
    m.registry.register(Measured(dict, {"window": Windows(Settings("DEFAULT", conf, tmp_path / "s.ini"))}))
    pages = [m.text().decode() for _ in range(2)]
    assert all('llmkit_window_outcome{family="calibration",outcome="fail",release="a"} 1.0' in p for p in pages)
    assert "llmkit_rollout_info{" not in pages[0] and caplog.text.count("tells of no rollout") == 1


def told():
    "Every command of the alerts and of the guide's table, with who tells it."
    plain = lambda text: re.sub(r"{{ \.Labels\.\w+ }}", "x", text)
    for a in FOUND.values():
        for text in a.told("1", "template").values():
            yield from ((a.name, c) for c in re.findall(r"llmkit [a-z]+ [a-z]+(?: --[a-z]+)?(?: x\b)?", plain(text)))
    cells = read_json(ROOT / "nbs/guides/06_watching.ipynb")["cells"]
    [page] = [t for c in cells if "| alert | look at | then |" in (t := "".join(c["source"]))]
    yield from (("the guide", c) for c in re.findall(r"`(llmkit [^`]+)`", page))


def test_every_command_that_an_alert_or_its_row_names_is_one_with_these_arguments():
    names = set()
    for where, command in told():
        name, words = find_command(shlex.split(command)[1:])
        names.add(name)
        if words:  # else only its name is told
            assert anno_parser(load(name)).parse_args(words), (where, command)
    assert {"rollout abort", "rollout undo", "rollout status", "monitor status", "monitor close"} <= names
