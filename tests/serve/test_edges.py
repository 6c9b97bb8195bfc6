"Values at the edge of what is allowed, asked of a real server."

import httpx
import pytest
from serve_server import PATIENCE

from llmkit.runtime.dummy import DummyEngine
from llmkit.runtime.sampling import Sampling

ASK = {"model": "bank", "prompt": "count", "max_tokens": 12, "temperature": 0}
COLD = [5e-324, 1e-300, 1e-17, 9e-7]


def post(url, path="completions", **more):
    return httpx.post(f"{url}/v1/{path}", json={**ASK, **more}, timeout=PATIENCE)


@pytest.mark.parametrize("more", [{}, {"top_p": 0.9}, {"top_k": 3}])
def test_a_temperature_near_zero_is_greedy(dummy, more):
    gateway, url = dummy
    engine = DummyEngine()
    greedy = engine.generate([[5, 6, 7]], Sampling(8))
    assert all(engine.generate([[5, 6, 7]], Sampling(8, t, **more)) == greedy for t in COLD)
    want = post(url).json()["choices"][0]["text"]
    for t in COLD:
        r = post(url, temperature=t, **more)
        assert r.status_code == 200 and r.json()["choices"][0]["text"] == want
    assert gateway.baseline.stats()["failed_steps"] == 0, "nobody else in the batch was touched"
