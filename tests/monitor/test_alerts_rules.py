"The generated alert rules pass their own unit tests, and a rule that is spoilt in any way does not."

import subprocess
from dataclasses import replace
from pathlib import Path

from telemetry_town import needs

from llmkit.core.files import write_json
from llmkit.core.params import load_params
from llmkit.monitor.alerts import alerts, rules_file, unit_tests

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
