"Checks by hand: options outside their ranges are refused before anything is read, and a strict level still sees what is there."

from pathlib import Path

import numpy as np
import pytest

from llmkit.core.params import ParamsError, load_params
from llmkit.monitor import check
from llmkit.monitor.dash import dash
from llmkit.monitor.drift import drift_report, text_features
from llmkit.monitor.policy import read_monitor
from llmkit.monitor.watch import monitor_run, monitor_status, monitor_watch
from llmkit.serve.events import KINDS, Events


@pytest.mark.parametrize(
    "command, option",
    [
        *((check.monitor_check, x) for x in ({"alpha": 0}, {"alpha": 7}, {"limit": 0}, {"min_n": 0}, {"seed": -1})),
        *((check.monitor_traffic, x) for x in ({"hours": 0}, {"before": float("inf")}, {"alpha": 1}, {"min_n": 0}, {"limit": -1})),
        *((monitor_watch, x) for x in ({"every": 0}, {"every": 1e10}, {"every": float("nan")}, {"windows": -1})),
        (monitor_status, {"n": 0}), (dash, {"hours": -1.0}),
    ],
)  # fmt: skip
def test_an_option_outside_its_range_is_refused_with_the_range(tmp_path, monkeypatch, command, option):
    monkeypatch.chdir(tmp_path)
    given = {"window": "texts.jsonl"} if command is check.monitor_check else {}
    with pytest.raises(ParamsError, match=rf"^{next(iter(option))}: is out of range \(got .*\)\. It lies in [\[(]"):
        command(**given, **option)


@pytest.mark.parametrize(
    "part, key, value", [("drift", "psi", -1.0), ("fairness", "min_n", 0), ("hallucination", "max", 5.0)]
)
def test_a_policy_outside_its_ranges_is_refused_with_file_value_and_range(part, key, value):
    section = load_params(Path(__file__).parents[2] / "params.yaml", "monitor")
    section[part] = section[part] | {key: value}
    with pytest.raises(
        ParamsError, match=rf"^params.yaml: monitor.{part}.{key}: is out of range \(got {value:g}.*It lies in"
    ):
        read_monitor(section, "params.yaml")


def test_a_strict_level_still_sees_prompts_that_are_three_times_as_long(monkeypatch):
    "Of 2000 draws the least p-value is 1 in 2001, and adjusted over four tests that is 0.004: below it nothing could drift."
    rng, alpha = np.random.default_rng(0), 0.001
    rows = lambda n, long: [{"status": "ok", "prompt_tokens": int(x), "completion_tokens": 9, "refused": False} for x in rng.poisson(long, n)]  # fmt: skip
    found = check.event_features(rows(600, 20), rows(300, 60), draws=check._least(alpha))
    assert "prompt_tokens_psi" in drift_report(found, 300, alpha).get("drifted_features").method
    words = lambda n, long: [" ".join(f"w{x}" for x in rng.integers(0, 30, k)) for k in rng.poisson(long, n)]
    monkeypatch.setattr("llmkit.monitor.drift.domain_auc", lambda *a, **k: (0.5, 1.0))  # slow, and not the point
    found = text_features(words(100, 10), words(100, 30), check._least(alpha))
    assert "length_psi" in drift_report(found, 100, alpha).get("drifted_features").method


def test_a_release_is_known_by_its_first_digits_and_an_unknown_one_is_told_with_those_that_answer(tmp_path, capsys):
    whole = "sha256:" + "ab" * 32
    base = dict.fromkeys(KINDS["request"].split()) | {"kind": "request", "status": "ok", "release": whole, "time": 1.0}
    (tmp_path / "s.ini").write_text(f"[DEFAULT]\nevents_db = {tmp_path}/e.db\nmonitor_db = {tmp_path}/m.db\n")
    Events(tmp_path / "e.db").append(*(base | {"id": f"q{i}"} for i in range(3)))
    policy, settings = str(Path(__file__).parents[2] / "params.yaml"), str(tmp_path / "s.ini")
    for named in (whole, "abababababab", ""):
        assert monitor_run(named, policy=policy, settings=settings) == 3
        assert "the reference of abababababab has 3 of 900 requests" in capsys.readouterr().out
    assert monitor_run("nope", policy=policy, settings=settings) == 3
    assert "the log has no request of nope; lately answered: abababababab" in capsys.readouterr().out
