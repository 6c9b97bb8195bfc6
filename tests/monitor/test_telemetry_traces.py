"Traces of real requests arrive at a receiver of OTLP, and a receiver that is away costs nobody an answer."

import gzip
import time
from contextlib import contextmanager

import httpx
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from serve_server import serving, until
from telemetry_town import receiver

from llmkit.core.settings import Settings
from llmkit.serve.traces import CONTENT, open_traces

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@contextmanager
def collector():
    "A receiver of OTLP over HTTP: its address, and the spans as they come."
    spans = []

    def take(headers, body):
        body = gzip.decompress(body) if headers.get("content-encoding") == "gzip" else body
        for r in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in r.scope_spans:
                spans.extend(scope.spans)

    with receiver(take) as url:
        yield url, spans


def traces(tmp_path, url, **environ):
    "Traces as a server opens them."
    return open_traces(Settings("DEFAULT", {"otlp_endpoint": url}, tmp_path / "settings.ini"), environ)


def ask(url, text, **more):
    "One question."
    body = {"model": "bank", "messages": [{"role": "user", "content": text}], "max_tokens": 5, **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers={"traceparent": PARENT}, timeout=60)


def plain(span):
    "The attributes of a span."
    kinds = {a.key: a.value for a in span.attributes}
    return {k: getattr(v, v.WhichOneof("value")) for k, v in kinds.items()}


def test_the_spans_of_a_request_arrive_without_its_text(make_gateway, tmp_path):
    with collector() as (url, spans):
        gateway = make_gateway(traces=traces(tmp_path, url))
        with serving(gateway) as at:
            assert ask(at, "card, a secret question").status_code == 200
            assert ask(at, "card", stream=True).text.endswith("data: [DONE]\n\n")
            assert ask(at, "card", model="other").status_code == 404
    named = [s for s in spans if s.name == "chat bank"]
    assert len(named) == 3, "the server's end sends what is left"
    good = next(s for s in named if plain(s)["llmkit.status"] == "ok")
    said = plain(good)
    assert said["gen_ai.usage.output_tokens"] == 5 and said["gen_ai.operation.name"] == "chat"
    assert good.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c" and good.parent_span_id.hex() == "b7ad6b7169203331"
    inside = {s.name: s for s in spans if s.parent_span_id == good.span_id}
    assert set(inside) == {"queue", "prefill", "decode"}
    assert good.start_time_unix_nano <= inside["queue"].start_time_unix_nano
    assert (
        inside["queue"].end_time_unix_nano
        <= inside["prefill"].end_time_unix_nano
        <= inside["decode"].end_time_unix_nano
    )
    assert inside["decode"].end_time_unix_nano <= good.end_time_unix_nano + 50_000_000
    assert abs(time.time() - good.start_time_unix_nano / 1e9) < 60
    refused = next(s for s in named if plain(s)["llmkit.status"] == "rejected")
    assert plain(refused)["error.type"] == "model_not_found"
    assert "secret" not in str(spans)


def test_text_is_there_when_somebody_asks_for_it(make_gateway, tmp_path):
    with collector() as (url, spans):
        with serving(make_gateway(traces=traces(tmp_path, url, **{CONTENT: "true"}))) as at:
            assert ask(at, "card, a secret question").status_code == 200
    assert "a secret question" in str(spans)


def test_a_collector_that_is_away_costs_no_answer(make_gateway, tmp_path):
    with serving(make_gateway(traces=traces(tmp_path, "http://127.0.0.1:9"))) as at:
        began = time.monotonic()
        assert [ask(at, "card").status_code for _ in range(5)] == [200] * 5
        until(lambda: httpx.get(f"{at}/health").status_code == 200)
        ended = time.monotonic()
    assert ended - began < 20 and time.monotonic() - ended < 15, "the end waits for seconds, not minutes"
