"The OpenAPI page is true enough to attack the server with, and the metrics are clean afterwards."

import shutil
import subprocess

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from serve_server import PATIENCE, serving

from llmkit.runtime.dummy import DummyEngine
from llmkit.serve.app import make_app
from llmkit.serve.backend import EngineBackend
from llmkit.serve.events import Events
from llmkit.serve.gateway import Gateway


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    return Gateway(
        "bank",
        {"baseline": EngineBackend(DummyEngine(), queue=4096)},
        events=Events(tmp_path_factory.mktemp("e") / "e.db"),
    )


@pytest.fixture(scope="module")
def address(gateway):
    with serving(gateway) as url:
        yield url


@pytest.fixture(scope="module")
def api(address):
    return schemathesis.openapi.from_url(f"{address}/openapi.json")


PATHS = make_app(Gateway("bank", {"baseline": EngineBackend(DummyEngine())}), check=False).openapi()["paths"]
OPERATIONS = [(path, method) for path, methods in PATHS.items() for method in methods]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda m: m.name.lower())
@pytest.mark.parametrize("path, method", OPERATIONS)
def test_no_5xx(api, path, method, mode):
    if mode is GenerationMode.NEGATIVE and method == "get":
        pytest.skip("nothing to get wrong")
    seen = []

    @given(case=api[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def attack(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "bank"
        response = case.call()
        seen.append(response.status_code)
        case.validate_response(response, checks=[not_a_server_error])
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    attack()
    if path in ("/v1/completions", "/v1/chat/completions"):
        assert mode is GenerationMode.NEGATIVE or 200 in seen, "some of it was answered"
        assert mode is GenerationMode.POSITIVE or 400 in seen


def test_metrics_are_clean_after_that(gateway, address):
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed")
    # the attacks may have run in another worker
    asked = httpx.post(f"{address}/v1/completions", json={"model": "bank", "prompt": "card", "max_tokens": 2}, timeout=PATIENCE)  # fmt: skip
    assert asked.status_code == 200
    text = gateway.metrics.text()
    assert b"llmkit_requests_total{" in text
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")
    assert gateway.open == 0, "every request came to its end"


def test_the_page_describes_what_is_enforced(api):
    body = api.raw_schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    assert body["additionalProperties"] is False and body["properties"]["logit_bias"]["enum"] == [{}, None]
    assert "429" in api.raw_schema["paths"]["/v1/completions"]["post"]["responses"]


def test_health_and_docs_need_nothing(dummy):
    _, url = dummy
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/ready").json()["model"] == "bank"
    page = httpx.get(f"{url}/docs").text
    assert "/v1/completions" in page and "http://" not in page and "https://" not in page
