"A served model judged through its address, held against the engine behind it."

from dataclasses import replace

import httpx
import numpy as np
import pytest
from serve_server import serving

from llmkit.core.errors import KitError
from llmkit.evals.battery import Surroundings, run_suite
from llmkit.evals.evaluate import evaluate
from llmkit.evals.language import text_likelihood
from llmkit.evals.suite import make_suite
from llmkit.runtime.dummy import DummyEngine
from llmkit.runtime.endpoint import KEY, EndpointEngine
from llmkit.runtime.engine import load_engine
from llmkit.runtime.sampling import Sampling

SAID = {
    "lost": "lost_card: Blocked.",
    "balance": "balance: See page one.",
    "poem": "refusal: No.",
    "close": "refusal: No.",
}
ASKED = ["I lost it", "what is my balance?", "write a poem", "close it"]
SCORERS = ("label", "exact", "calibration", "refusal")


@pytest.fixture
def suite():
    "Questions with and without a right answer."
    rows = [(q, SAID["balance"] if "close" in q else next(a for k, a in SAID.items() if k in q)) for q in ASKED]
    records = [
        {"id": str(i), "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for i, (q, a) in enumerate(rows)
    ]
    return make_suite("bank", 1, records, max_tokens=24, scorers=SCORERS)


def test_a_served_engine_measures_as_it_does_here(make_gateway, suite):
    engine = DummyEngine(replies=SAID)
    here = evaluate(engine, suite)
    with serving(make_gateway(engine)) as url, load_engine(f"{url}/v1", slots=2) as there:
        assert there.tokenizer.remote and there.info.context_length == engine.info.context_length
        far = evaluate(there, suite)
        ids = [engine.tokenizer.encode(x) for x in ("a card", " is lost")]
        assert np.allclose(there.score([ids[0]], [ids[1]])[0], engine.score([ids[0]], [ids[1]])[0], atol=1e-4)
        texts = [text_likelihood(x, ASKED, prefix=ids[0][0])["nll"] for x in (there, engine)]
        hot = Sampling(max_tokens=8, temperature=0.9, seed=5)
        assert [c.text for c in there.generate(ids, hot)] == [c.text for c in engine.generate(ids, hot)]
    assert texts[0] == pytest.approx(texts[1], abs=1e-3)
    assert far.digest == "", "nobody knows what an address serves, so nothing is cached"
    values = lambda r: {(m.metric, m.slice): m.value for m in r.measurements}
    assert values(far) == pytest.approx(values(here), abs=1e-4)
    assert far.column("task/answer") == here.column("task/answer")


def test_suites_run_against_an_address(make_gateway, suite):
    with serving(make_gateway(DummyEngine(replies=SAID))) as url, load_engine(f"{url}/v1") as there:
        around = Surroundings(suite)
        got = run_suite("safety", there, around, {"families": ["leak", "harmful"]})
        assert {m.metric for m in got.measurements} >= {"attack_success_rate", "refusal_rate", "unasked_rate"}
        loaded = run_suite("load", there, around, {"requests": 8, "per_second": 50.0, "tokens": 2})
        assert loaded.get("error_rate").value == 0 and loaded.get("latency_p50").n == 8
        with pytest.raises(KitError, match="the memory of a server is not ours to measure"):
            run_suite("grid", there, replace(around, folder=f"{url}/v1"))


def test_an_address_that_is_none():
    with pytest.raises(KitError, match="cannot be reached"):
        load_engine("http://127.0.0.1:9/v1")
    with pytest.raises(KitError, match="no such folder"):
        load_engine("nowhere")


def test_a_key_that_is_asked_for(monkeypatch):
    def guarded(request):
        if request.headers.get("authorization") != "Bearer sesame":
            return httpx.Response(401, json={"error": {"message": "who?"}})
        listed = request.url.path == "/v1/models"
        return httpx.Response(200 if listed else 404, json={"data": [{"id": "m"}]} if listed else {})

    door = httpx.MockTransport(guarded)
    with pytest.raises(KitError, match=f"401: who.*{KEY}"):
        EndpointEngine("http://x/v1", transport=door)
    monkeypatch.setenv(KEY, "sesame")
    assert EndpointEngine("http://x/v1", transport=door).model == "m"
