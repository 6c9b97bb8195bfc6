"`llmkit load` against a real server that refuses: what failed, how often, and why in its own words."

import threading

from serve_server import REPLIES, Gated, serving

from llmkit.cli import main
from llmkit.core.report import read_report


def load(url, *more):
    return main(["load", f"{url}/v1", "--per-second", "200", "--requests", "60", "--tokens", "2", *more])


def test_a_wrong_name_is_told_in_the_servers_words(dummy, capsys):
    assert load(dummy[1], "--model", "x") == 2
    told = capsys.readouterr()
    assert "60 of 60 failed: HTTP 404 (The model 'x' does not exist here." in told.err and "bank" in told.err
    assert told.out == "" and "Traceback" not in told.err


def test_without_a_name_the_first_model_of_the_server_is_asked(dummy, capsys):
    assert load(dummy[1]) == 0
    assert capsys.readouterr().err == ""


def test_a_missing_key_is_told_too(make_gateway, tmp_path, capsys):
    from llmkit.serve.keys import Keys

    keys = Keys(tmp_path / "serve.db")
    keys.create("ci")
    with serving(make_gateway(keys=keys)) as url:
        assert load(url, "--model", "bank") == 2
    assert "60 of 60 failed: HTTP 401 (" in capsys.readouterr().err


def test_some_failures_are_counted_beside_the_report(make_gateway, tmp_path, capsys):
    "One runs and one waits while the gate is shut; the others are refused, and the last ones answered."
    engine = Gated(replies=REPLIES)
    engine.gate.clear()
    with serving(make_gateway(engine, slots=1, queue=1)) as url:
        threading.Timer(1.0, engine.gate.set).start()
        assert load(url, "--model", "bank", "--per-second", "20", "--out", str(tmp_path / "report")) == 0
    told, report = capsys.readouterr(), read_report(tmp_path / "report")
    bad = round(report.get("error_rate").value * 60)
    assert 0 < bad < 60 and f"{bad} of 60 failed: HTTP 503 (The queue is full)" in told.err
    assert sum("HTTP 503 (" in e for e in report.column("requests/error")) == bad
    assert "error_rate" in told.out


def test_no_failure_no_word(dummy, capsys):
    assert load(dummy[1], "--model", "bank") == 0
    told = capsys.readouterr()
    assert told.err == "" and "goodput" in told.out
