"`llmkit serve` refuses the numbers with which it could serve nothing."

from inspect import signature

import pytest

import llmkit.rollout.serve as command
from llmkit.cli import main
from llmkit.serve.server import set_up

BAD = {
    "--slots": "0",
    "--queue": "0",
    "--timeout": "0",
    "--max-output": "0",
    "--context": "-5",
    "--port": "99999",
    "--days": "-1",
}


@pytest.mark.parametrize("option", BAD)
def test_what_would_serve_nothing_is_refused(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    assert main(["serve", option, BAD[option]]) == 2
    said = capsys.readouterr().err
    assert f"{option}: must be" in said and BAD[option] in said and said.count("\n") == 1


def test_a_drain_below_zero_is_refused_before_anybody_is_served(tmp_path, monkeypatch, capsys):
    import llmkit.serve.server as server
    from llmkit.runtime.dummy import DummyEngine
    from llmkit.serve.backend import EngineBackend

    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    monkeypatch.setattr(server, "resolve", lambda *a: server.Target("bank", "here"))
    monkeypatch.setattr(server, "open_backend", lambda found, said=None, **how: EngineBackend(DummyEngine(), **how))
    assert main(["serve", "--target", "here", "--drain", "-1", "--port", "0"]) == 2
    assert "--drain: must be at least 0 (got -1.0). 30 is usual" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["nowhere.yaml", "."])
def test_a_policy_that_was_named_and_is_no_file_is_refused(policy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "--target", "here", "--policy", policy, "--port", "0"]) == 2
    assert capsys.readouterr().err.startswith(f"llmkit: {policy}: ")


def test_each_option_of_the_command_arrives_where_the_server_is_set_up(monkeypatch):
    class Seen(Exception):
        pass

    def seen(target, **how):
        got.update(how, target=target)
        raise Seen

    here, there, got = signature(command.serve).parameters, signature(set_up).parameters, {}
    asked = {n: type(p.default)(i + 100) for i, (n, p) in enumerate(here.items())}
    assert {n: (p.kind, p.annotation, p.default) for n, p in there.items()} == {
        n: (p.kind, p.annotation, p.default) for n, p in here.items() if n in there
    }
    monkeypatch.setattr(command, "set_up", seen)
    with pytest.raises(Seen):
        command.serve(**asked)
    assert got == {n: asked[n] for n in there}
