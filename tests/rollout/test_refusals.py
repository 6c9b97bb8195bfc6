"""What must never carry a promotion, and what must never stop an abort."""

import copy

import pytest

from llmkit.core.errors import KitError
from llmkit.core.params import load_params
from llmkit.gate.verdict import Verdict
from llmkit.rollout.controller import Controller
from llmkit.rollout.event import readable
from llmkit.rollout.policy import read_rollout
from llmkit.rollout.reducer import reduce
from llmkit.rollout.state import Evidence
from llmkit.rollout.store import Store

PAIRS = {"kind": "shadow", "time": 1.0, "id": "i", "release": "b", "result": "ok", "latency": 0.1, "agreement": 1.0, "exact": True, "label_same": None}  # fmt: skip
REQUEST = {"kind": "request", "time": 1.0, "id": "i", "variant": "baseline", "release": "a", "unit": "u", "code": 200, "status": "ok", "latency": 0.1, "prompt_tokens": 5, "fallback": False, "refused": None}  # fmt: skip


class Nowhere:
    "A registry that forgets."

    def move(self, effect):
        return None


def section():
    return copy.deepcopy(load_params("params.yaml", "rollout"))


@pytest.mark.parametrize("evidence", [Evidence(), Evidence(Verdict("error", (), "d"), silent=True), Evidence(Verdict("fail", (), "d"), samples=9, silent=False)])  # fmt: skip
def test_a_person_who_resumes_the_last_pause_needs_data_too(evidence):
    rules = section()
    rules["stall_after"] = "0.3s"
    rules["steps"] = [{"setWeight": 20}, {"analysis": {"min_duration": "1s", "max_duration": "1m", "min_samples": 10}}, {"setWeight": 80}, {"pause": {}}]  # fmt: skip
    policy = read_rollout(rules)
    start = {"kind": "start", "time": 0, "id": "r", "model": "m", "releases": {"baseline": "a", "canary": "b"}}
    good = Evidence(Verdict("pass", (), "d"), digest="d", samples=100, silent=False)
    state, _ = reduce(policy, reduce(policy, None, start)[0], {"kind": "tick", "time": 10}, good)
    assert (state.phase, state.paused_by) == ("Paused", "step")
    resume = {"kind": "resume", "time": 99, "who": "ann"}
    with pytest.raises(KitError):
        reduce(policy, state, resume, evidence)
    assert reduce(policy, state, resume, good)[0].phase == "Healthy"


@pytest.mark.parametrize("odd", [{"exact": "yes"}, {"label_same": "x"}, {"agreement": 7.0}, {"kind": ["x"]}, {"id": 5}, {"result": ["ok"]}, {"release": {}}])  # fmt: skip
def test_a_copy_that_no_analysis_could_read_is_refused(odd):
    assert readable(PAIRS)
    assert not readable(PAIRS | odd)


@pytest.mark.parametrize("odd", [{"fallback": "no"}, {"refused": 3}, {"variant": ["x"]}, {"status": None, "code": None}, {"unit": 4}])  # fmt: skip
def test_a_request_that_no_analysis_could_read_is_refused(odd):
    assert readable(REQUEST)
    assert not readable(REQUEST | odd)


def test_an_abort_asks_no_analysis(tmp_path, monkeypatch):
    store = Store(tmp_path / "rollouts.db")
    store.create("r", section())
    c = Controller(store, "r", Nowhere())
    c.command("start", "ann", "", model="m", releases={"baseline": "a", "canary": "b"})

    def breaks(*_):
        raise ValueError("whatever may be wrong with the data")

    monkeypatch.setattr("llmkit.rollout.fold.analyse", breaks)
    with pytest.raises(ValueError):
        c.step()
    assert Controller(store, "r", Nowhere()).command("abort", "ann", "now").phase == "Degraded"
