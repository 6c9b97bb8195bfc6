"The generated alert rules pass their own unit tests, and a rule that is spoilt in any way does not."

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from telemetry_town import lint, needs

from llmkit.core.errors import KitError
from llmkit.core.files import read_json, write_json
from llmkit.core.params import load_params
from llmkit.core.settings import Settings
from llmkit.gate.verdict import Verdict
from llmkit.monitor.alerts import alerts, rules_file, unit_tests
from llmkit.monitor.policy import read_monitor
from llmkit.monitor.scrape import Windows
from llmkit.monitor.state import Action, Memory, Seen
from llmkit.serve.events import KINDS, Events
from llmkit.serve.measured import Measured
from llmkit.serve.metrics import Metrics

ROOT = Path(__file__).parents[2]
FOUND = alerts(load_params(ROOT / "params.yaml"))


def outcome(folder, rules, asked=FOUND, **how):
    "What promtool says of rules under the tests of others."
    write_json(folder / "rules.yml", rules_file(rules, **how))
    write_json(folder / "tests.yml", unit_tests(asked, "rules.yml", **how))
    done = subprocess.run(["promtool", "test", "rules", "tests.yml"], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@needs("promtool")
def test_all_rules_pass_their_tests(tmp_path):
    code, said = outcome(tmp_path, FOUND)
    assert code == 0, said


@needs("promtool")
def test_a_rule_that_never_fires_or_always_fires_fails_its_tests(tmp_path):
    always = lambda a: f'label_replace({next(iter(a.fires))} * 0 + 1, "a", "b", "", "")'
    spoilt = [
        replace(a, expr=f"({a.expr}) and on() vector(0) > 1" if i % 2 else always(a)) for i, a in enumerate(FOUND)
    ]
    code, said = outcome(tmp_path, spoilt)
    assert code == 1 and [a.name for a in FOUND if f"alertname: {a.name}," not in said] == []


@needs("promtool")
def test_other_windows_and_holds_are_tested_as_they_are_written(tmp_path):
    pick = [a for a in FOUND if a.name in ("LlmkitErrorRate", "LlmkitEventsLost", "LlmkitLatencyP95")]
    for how in ({"window": "10s", "hold": "0s"}, {"window": "1h", "hold": "2h"}):
        code, said = outcome(tmp_path, pick, pick, **how)
        assert code == 0, said


def test_the_limits_are_those_of_the_policy():
    params = load_params(ROOT / "params.yaml")
    by = {a.name: a for a in FOUND}
    stop = params["rollout"]["canary"][0]["hard_stop"]
    assert f"> {stop['max']:g}" in by["LlmkitErrorRate"].expr and f">= {stop['min_n']}" in by["LlmkitErrorRate"].expr
    [slow] = [r["max"] for r in params["gates"]["rules"] if r["metric"] == "latency_p95"]
    assert by["LlmkitLatencyP95"].expr.endswith(f"> {slow:g}")
    params["rollout"]["canary"][0]["hard_stop"]["max"] = 0.07
    assert "> 0.07" in {a.name: a for a in alerts(params)}["LlmkitErrorRate"].expr


def told(folder, name, series, *expected):
    "What promtool says of one alert: series → values by the minute, and (minute, labels of what fires) for each time."
    [a] = [a for a in FOUND if a.name == name]
    write_json(folder / "rules.yml", rules_file(FOUND))
    fires = lambda labels, value: {"exp_labels": {"severity": a.severity, **labels}, "exp_annotations": a.told(value)}  # fmt: skip
    tests = [{"eval_time": f"{m}m", "alertname": name, "exp_alerts": [fires(*x) for x in some]} for m, some in expected]
    body = {"interval": "1m", "input_series": [{"series": s, "values": v} for s, v in series.items()], "alert_rule_test": tests}  # fmt: skip
    write_json(folder / "tests.yml", {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [body]})
    done = subprocess.run(["promtool", "test", "rules", "tests.yml"], cwd=folder, capture_output=True, text=True)
    return done.returncode, (done.stdout + done.stderr).split()[-1]


DONE = (0, "SUCCESS")


@needs("promtool")
def test_an_alert_of_an_action_fires_while_it_is_open_and_resolves(tmp_path):
    series = lambda kind, state: f'llmkit_monitor_actions_open{{kind="{kind}",state="{state}"}}'
    for name, kind, state, hold in (
        ("LlmkitActionFailed", "retrain", "failed", 15), ("LlmkitActionFailed", "rollback", "lost", 15),
        ("LlmkitActionFailed", "retrain", "requested", 15), ("LlmkitActionHeld", "rollback", "held", 5), ("LlmkitActionStuck", "rollback", "requested", 15),
    ):  # fmt: skip
        firing = [({"kind": kind, "state": state}, "1")]
        values = "0 0 " + "1 " * 20 + "0 0 0"  # open from minute 2 to 21
        times = (1, []), (2 + hold - 1, []), (2 + hold, firing), (21, firing), (22, [])
        assert told(tmp_path, name, {series(kind, state): values}, *times) == DONE, name
    quick = "0 0 1 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0"  # requested, and done two minutes later
    assert told(tmp_path, "LlmkitActionStuck", {series("rollback", "requested"): quick}, (19, [])) == DONE


@needs("promtool")
def test_a_service_that_was_never_judged_is_told_and_a_young_or_idle_one_is_not(tmp_path):
    p = read_monitor(load_params(ROOT / "params.yaml", "monitor"))
    late = int(p.at_most + p.label_lag + 7200)  # an hour longer than the rule waits
    asked, since = (
        'llmkit_requests_total{model="m",variant="v",status="ok"}',
        "llmkit_window_waiting_since_timestamp_seconds",
    )
    end, grows, idle = "llmkit_window_end_timestamp_seconds", "0+5x20", "5+0x20"
    old, young = f"-{late}+0x20", f"-{late - 7200}+0x20"
    fires = [({}, f"{-late:.3g}")]
    assert told(tmp_path, "LlmkitWindowNever", {asked: grows, since: old}, (12, fires)) == DONE
    assert told(tmp_path, "LlmkitWindowLate", {asked: grows, since: old, end: old}, (12, fires)) == DONE
    for series in ({asked: grows, since: young}, {asked: idle, since: old}, {asked: grows, since: old, end: old}):
        assert told(tmp_path, "LlmkitWindowNever", series, (12, [])) == DONE, series
    monday = {asked: grows, since: young, end: f"-{5 * late}+0x20"}  # nobody asked at the weekend
    for series in (monday, {asked.replace("ok", "rejected"): grows, since: old, end: old}, {asked: grows, end: old}):
        assert told(tmp_path, "LlmkitWindowLate", series, (12, [])) == DONE, series
    two = {f'{since}{{job="llmkit",instance="{i}:1"}}': old for i in "ab"} | {asked: grows}
    two[f'{end}{{job="llmkit",instance="a:1"}}'] = old
    lonely = [({"job": "llmkit", "instance": "b:1"}, fires[0][1])]
    assert told(tmp_path, "LlmkitWindowNever", two, (12, lonely)) == DONE


@needs("promtool")
def test_the_first_finding_of_a_process_is_told_and_an_old_count_is_not(tmp_path):
    leak = 'llmkit_guard_findings_total{guard="output_canary",entity="MARKER",action="flag"}'
    times = (2, []), (4, [({}, "1")]), (7, [({}, "1")]), (9, [])
    assert told(tmp_path, "LlmkitCanaryTokenLeaked", {leak: "_ _ _ 1+0x30"}, *times) == DONE


@needs("promtool")
def test_nobody_is_woken_for_what_the_guard_withheld_or_for_a_training(tmp_path):
    for action in ("block", "mask"):
        leak = f'llmkit_guard_findings_total{{guard="output_canary",entity="CANARY",action="{action}"}}'
        assert told(tmp_path, "LlmkitCanaryTokenLeaked", {leak: "_ _ _ 1+1x30"}, (4, []), (20, [])) == DONE
    stuck = 'llmkit_monitor_actions_open{kind="retrain",state="requested"}'
    assert told(tmp_path, "LlmkitActionStuck", {stuck: "1+0x30"}, (20, [])) == DONE


def test_each_alert_names_its_row_of_the_guide():
    for rule in rules_file(FOUND)["groups"][0]["rules"]:
        assert rule["alert"] in rule["annotations"]["runbook"] and "06_watching" in rule["annotations"]["runbook"]


@needs("promtool")
def test_scrapes_that_failed_for_a_while_make_no_old_count_new(tmp_path):
    where = 'job="llmkit",instance="a:1"'
    leak = f'llmkit_guard_findings_total{{guard="output_canary",entity="MARKER",action="flag",{where}}}'
    begun = f"process_start_time_seconds{{{where}}}"
    for counts, starts, fires in (
        ("1+0x9 _x9 1+0x20", "-900+0x9 _x9 -900+0x20", False),  # the same process, and the same count
        ("1+0x9 _x9 2+0x20", "-900+0x9 _x9 -900+0x20", True),  # one more meanwhile
        ("1+0x9 _x9 1+0x20", "-900+0x9 _x9 1000+0x20", True),  # another process, whose first it is
        ("_x19 1+0x20", "-900+0x39", True),  # the first of all
    ):
        said = [({}, counts.split()[-1][0])] if fires else []
        series = {leak: counts, begun: starts}
        assert told(tmp_path, "LlmkitCanaryTokenLeaked", series, (9, []), (20, said), (27, [])) == DONE, (
            counts,
            starts,
        )


def test_a_gate_on_time_becomes_an_alert_that_can_fire_or_none():
    params = load_params(ROOT / "params.yaml")
    others = [r for r in params["gates"]["rules"] if r["metric"] != "latency_p95"]

    def made(metric, limit):
        params["gates"]["rules"] = [*others, {"metric": metric, "max": limit}]
        return [a.expr.partition("(")[2].partition(",")[0] for a in alerts(params) if a.policy.startswith("gates")]

    assert [made(f"ttft_p{q}", 2.0) for q in ("50", "5", "99.9")] == [["0.5"], ["0.05"], ["0.999"]]
    for other in ("latency_p95_at_least", "latency_per_token", "latency_p100"):  # nothing that traffic has
        assert made(other, 2.0) == []
    for metric, limit in (("latency_p95", 120.0), ("ttft_p95", 10.0)):
        with pytest.raises(KitError, match="could never fire"):
            made(metric, limit)


@needs("promtool")
def test_a_timed_pause_waits_for_nobody(tmp_path):
    phase = 'llmkit_rollout_phase{phase="Paused",model="m"}'
    paused = [({"phase": "Paused", "model": "m"}, "1")]
    assert told(tmp_path, "LlmkitRolloutPaused", {phase: "1+0x20"}, (9, paused)) == DONE
    series = {phase: "1+0x20", 'llmkit_rollout_timed_pause{model="m"}': "1+0x9 0+0x10"}
    assert told(tmp_path, "LlmkitRolloutPaused", series, (9, []), (16, paused)) == DONE


@needs("promtool")
def test_what_stalled_and_ended_counts_once(tmp_path):
    "A quarter stalls, and ends: more than the fifth that is allowed."
    of = lambda name: f'{name}{{model="m",variant="v"}}'
    series = {
        of("llmkit_requests_total").replace("}", ',status="ok"}'): "0+100x20",
        of("llmkit_stalled_total"): "0+24x20",
    }
    assert told(tmp_path, "LlmkitStallRate", series, (12, [])) == DONE  # as of a server that does not tell
    series[of("llmkit_stalled_ended_total")] = "0+24x20"
    assert told(tmp_path, "LlmkitStallRate", series, (12, [({"model": "m"}, "0.24")])) == DONE


@needs("promtool", "amtool")
def test_whatever_durations_are_asked_for_prometheus_understands_them(tmp_path):
    from llmkit.monitor.wiring import alerts_write

    how = {"every": "0.5s", "window": "0.5h", "hold": "1.5m", "wait": "1h30m"}
    assert alerts_write(str(tmp_path), policy=str(ROOT / "params.yaml"), **how) == 0
    for args in (["promtool", "check", "config", "prometheus.yml"], ["promtool", "test", "rules", "llmkit.rules.test.yml"], ["amtool", "check-config", "alertmanager.yml"]):  # fmt: skip
        done = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    write_json(tmp_path / "gates.yaml", {"gates": {"rules": []}})
    with pytest.raises(KitError, match="no such section"):
        alerts_write(str(tmp_path / "none"), policy=str(tmp_path / "gates.yaml"))


def scrape(folder):
    "What the server's page says of a folder's monitoring."
    conf = {"monitor_db": str(folder / "m.db"), "events_db": str(folder / "e.db")}
    m = Metrics()
    m.registry.register(Measured(dict, {"window": Windows(Settings("DEFAULT", conf, folder / "settings.ini"))}))
    return m.text().decode()


def still_open(folder):
    "The actions that the page calls open."
    found = re.findall(r'^llmkit_monitor_actions_open{kind="(.+)",state="(.+)"} (.+)$', scrape(folder), re.M)
    return {(kind, state): int(float(n)) for kind, state, n in found if float(n)}


def seen(release, number, **outcomes):
    return Seen(release, number, 1, 9, 0.0, 9.0, 9, 0, (), outcomes, Verdict("fail", (), "sha256:p"))


def test_an_action_is_open_until_something_follows(tmp_path):
    memory = Memory(tmp_path / "m.db")
    act = lambda kind, n, release="sha256:a", state="requested": Action(f"{kind}-{release}-{n}", kind, float(n), release, n, "drift", state)  # fmt: skip
    first, back = act("retrain", 1), act("rollback", 1)
    memory.add(seen("sha256:a", 1, data="fail", cost="pass"), {}, {}, [first, back])
    assert still_open(tmp_path) == {("retrain", "requested"): 1, ("rollback", "requested"): 1}
    memory.move(first, "failed"), memory.move(back, "held")
    memory.add(seen("sha256:a", 2, data="fail", cost="pass"), {}, {})
    memory.add(seen("sha256:a", 3, data="inconclusive", cost="pass"), {}, {})  # nothing measured is nothing mended
    assert still_open(tmp_path) == {("retrain", "failed"): 1, ("rollback", "held"): 1}
    second = act("retrain", 4)
    memory.add(seen("sha256:a", 4, data="fail"), {}, {}, [second])
    memory.move(second, "started")
    assert still_open(tmp_path) == {("retrain", "failed"): 1, ("retrain", "started"): 1, ("rollback", "held"): 1}
    memory.move(second, "done")  # a later one of its kind
    assert still_open(tmp_path) == {("rollback", "held"): 1}
    memory.add(seen("sha256:b", 0, data="inconclusive"), {}, {})  # a person has moved the traffic
    assert still_open(tmp_path) == {}
    stuck = act("rollback", 5, "sha256:b")
    memory.add(seen("sha256:b", 5, data="fail"), {}, {}, [stuck])
    memory.add(seen("sha256:a", 6, data="pass"), {}, {}, [act("rollback", 6, state="done")])
    assert still_open(tmp_path) == {("rollback", "requested"): 1}  # whatever follows: it has not ended
    lost = act("retrain", 7)
    memory.add(seen("sha256:a", 7, data="fail"), {}, {}, [lost])
    memory.move(lost, "lost")
    assert still_open(tmp_path) == {("rollback", "requested"): 1, ("retrain", "lost"): 1}
    memory.add(seen("sha256:a", 8, data="pass"), {}, {})  # what asked for it is gone
    assert still_open(tmp_path) == {("rollback", "requested"): 1}


@needs("promtool")
def test_the_page_says_since_when_requests_wait_for_a_window(tmp_path):
    name = "\nllmkit_window_waiting_since_timestamp_seconds "
    assert name not in scrape(tmp_path) and not (tmp_path / "e.db").exists()
    base = dict.fromkeys(KINDS["request"].split()) | {"kind": "request", "status": "ok", "code": 200, "variant": "v"}
    for t in (1000.0, 2000.0, 3000.0):
        Events(tmp_path / "e.db").append(base | {"time": t, "id": f"q{t}", "release": "sha256:a"})
    memory = Memory(tmp_path / "m.db")
    said = scrape(tmp_path)
    assert f"{name}1000.0\n" in said and lint(said) == (0, "")
    memory.add(seen("sha256:a", 0, data="pass"), {}, {"number": 1, "after": 2, "reference": []})
    assert f"{name}3000.0\n" in scrape(tmp_path)
    memory.add(seen("sha256:a", 1, data="pass"), {}, {"number": 2, "after": 3, "reference": []})
    assert name not in scrape(tmp_path)


def test_the_guide_lists_every_alert_and_no_other():
    cells = read_json(ROOT / "nbs/guides/06_watching.ipynb")["cells"]
    [table] = [t for c in cells if "| alert | look at | then |" in (t := "".join(c["source"]))]
    listed = re.findall(r"`(Llmkit\w+)`", "\n".join(x.split("|")[1] for x in table.splitlines() if x.startswith("|")))
    assert sorted(listed) == sorted(a.name for a in FOUND)


@needs("promtool")
def test_an_abort_is_told_for_a_week_or_until_another_rollout_begins(tmp_path):
    "Hours in place of minutes: the server is away for the first twelve, and started again after two days."
    series = lambda phase: f'llmkit_rollout_phase{{phase="{phase}",model="m"}}'
    since, hour = 'llmkit_rollout_since_timestamp_seconds{model="m"}', 60
    firing = [({"model": "m", "phase": "Degraded"}, "1")]
    away = "_ " * 12 * hour + "1 " * 36 * hour + "_ " * hour + "1 " * 11 * 24 * hour
    times = (11 * hour, []), (12 * hour, firing), (72 * hour, firing), (167 * hour, firing), (169 * hour, [])
    assert told(tmp_path, "LlmkitRolloutDegraded", {series("Degraded"): away, since: "0+0x20000"}, *times) == DONE
    assert (
        told(tmp_path, "LlmkitRolloutDegraded", {series("Degraded"): away}, (169 * hour, firing)) == DONE
    )  # an older server
    another = "1 " * 60 + "0 " * 60 + "1 " * 60
    moved = {series("Degraded"): another, since: "0+0x59 3600+0x59 7200+0x60"}
    assert told(tmp_path, "LlmkitRolloutDegraded", moved, (59, firing), (61, []), (125, firing)) == DONE
